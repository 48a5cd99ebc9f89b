"""Background tasks: failures are logged, work goes on, closing is bounded."""

from __future__ import annotations

import asyncio

import pytest

from specpool.background import Background


async def test_work_that_fails_is_logged_with_its_traceback_and_starts_again(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("part", first_pause_s=0.01)
    recovered = asyncio.Event()
    num_starts = 0

    async def work() -> None:
        nonlocal num_starts
        num_starts += 1
        if num_starts < 3:
            raise RuntimeError(f"start {num_starts} went wrong")
        recovered.set()
        await asyncio.sleep(3600)

    background.keep_running(work, name="renewal")
    await asyncio.wait_for(recovered.wait(), 30)
    assert [record.message.partition(";")[0] for record in caplog.records] == ["part: renewal failed"] * 2
    assert "start 1 went wrong" in caplog.text
    assert "Traceback" in caplog.text
    await background.close()
    assert len(background) == 0


async def test_work_that_returns_is_done() -> None:
    background = Background("part")

    async def work() -> None:
        pass

    await asyncio.wait_for(background.keep_running(work, name="short"), 30)
    assert len(background) == 0


async def test_one_piece_of_work_is_logged_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("part")

    async def work() -> None:
        raise ValueError("odd")

    await asyncio.wait_for(background.run(work(), name="pairing"), 30)
    assert "part: pairing failed" in caplog.text
    assert "ValueError: odd" in caplog.text


async def test_closing_does_not_wait_for_work_that_will_not_end(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("part")
    release, deaf = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                deaf.set()

    background.run(work(), name="stubborn")
    await asyncio.sleep(0)
    await background.close(timeout_s=0.05)
    assert deaf.is_set()
    assert "part: stubborn did not end in 0.05 s" in caplog.text
    release.set()
    await background.close()
