"""An engine's thread while its server runs: started, watched, ended within a time.

One that hangs is found from the event loop, since the thread itself cannot tell: an engine that never comes back from a
forward leaves health, status and keepalive as they were. Every stream then ends with `EngineHung`; the process stops,
and exits with an error, to be started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import traceback
from collections.abc import AsyncIterator
from typing import Final

from specpool.errors import EngineHung
from specpool_engine.modeling.interface import CausalModel, close_model, watch_model
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_engine.runtime.heartbeat import IDLE, WARMING_UP

_logger = logging.getLogger(__name__)
_STOP_S: Final = 10.0
"""Seconds that the end waits for the step that runs."""
_POLLS: Final = 8
"""Number of times that the heartbeat is looked at within a limit."""
_MAX_POLL_S: Final = 5.0
_WARM_UP_FACTOR: Final = 6
"""How many times as long as a step a warm-up may take: it pages in, allocates and compiles."""


@contextlib.asynccontextmanager
async def running(thread: EngineThread, model: CausalModel, stall_timeout_s: float) -> AsyncIterator[None]:
    """Within this context the engine is warm and works on; raises its failure at the end.

    Args:
        thread: not started yet; it is ended together with what `model` started.
        model: of the engine.
        stall_timeout_s: for longer than that the thread may not do one thing.
    """
    watch_model(model, thread.abort)
    thread.start()
    watcher = asyncio.create_task(_watch(thread, stall_timeout_s), name=f"watcher of the {thread.name}")
    try:
        await asyncio.to_thread(thread.wait_ready)
        yield
    finally:
        watcher.cancel()
        thread.stop()
        has_ended = await asyncio.to_thread(thread.join, 0.0 if isinstance(thread.failure, EngineHung) else _STOP_S)
        if has_ended:  # else the model is in use
            await asyncio.to_thread(close_model, model)
    if thread.failure is not None:
        raise thread.failure


async def _watch(thread: EngineThread, stall_timeout_s: float) -> None:
    heartbeat = thread.heartbeat
    poll_s = min(stall_timeout_s / _POLLS, _MAX_POLL_S)
    seen, stalled_s = heartbeat.since_s, 0.0
    while thread.failure is None:
        await asyncio.sleep(poll_s)
        doing, since_s = heartbeat.doing, heartbeat.since_s
        # Polls are added up rather than clocks compared: a process that was stopped as a whole does not hang.
        stalled_s = stalled_s + poll_s if since_s == seen and doing is not IDLE else 0.0
        seen = since_s
        if stalled_s >= stall_timeout_s * (_WARM_UP_FACTOR if doing is WARMING_UP else 1):
            _logger.critical("the %s hangs, %s:\n%s", thread.name, doing, _stack(thread))
            thread.abort(EngineHung(f"the {thread.name} hangs: it has been {doing} for {stalled_s:.0f} s"))


def _stack(thread: EngineThread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
