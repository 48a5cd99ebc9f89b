"""Cancelled in the moment in which its speculator is told of it: no sequence is left there."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from specpool_target.engine.engine import TargetEngine
from specpool_target.next_round.knowledge import SpeculatorKnowledge

WAIT_S = 60


async def test_a_close_does_not_overtake_the_open_of_its_step(target_for, speculator_for, monkeypatch) -> None:
    """The engine has the open ready when the cancellation comes, and the sequence ends in that very step."""
    target, speculator = await target_for(), await speculator_for()
    await target.generate(mode="ssd", speculator=speculator.endpoint, max_tokens=3)
    opened, cancelled = threading.Event(), threading.Event()
    open_sequence, cancel = SpeculatorKnowledge.open, TargetEngine.cancel

    def open_and_wait(self: Any, sequence: Any) -> None:
        open_sequence(self, sequence)
        if len(sequence.request.prompt_tokens) == 7:
            opened.set()
            assert cancelled.wait(WAIT_S)

    def note_cancel(self: Any, sequence_id: str) -> None:
        cancel(self, sequence_id)
        if opened.is_set():
            cancelled.set()

    monkeypatch.setattr(SpeculatorKnowledge, "open", open_and_wait)
    monkeypatch.setattr(TargetEngine, "cancel", note_cancel)
    call = target.stub.RunSequence(
        target.message(range(7), mode="ssd", speculator=speculator.endpoint, max_tokens=1), timeout=WAIT_S
    )
    reading = asyncio.ensure_future(call.read())
    assert await asyncio.to_thread(opened.wait, WAIT_S)
    call.cancel()
    assert await asyncio.to_thread(cancelled.wait, WAIT_S)
    await asyncio.gather(reading, return_exceptions=True)
    # Whatever was sent before this one's messages has arrived when these have.
    await target.generate((4, 5), mode="ssd", speculator=speculator.endpoint, max_tokens=3)
    async with asyncio.timeout(WAIT_S):
        while speculator.live:
            await asyncio.sleep(0.01)
    assert speculator.seen["open_sequence"] == speculator.seen["close_sequence"] == 3
