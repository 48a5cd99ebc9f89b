"""Ends that always come: parts of a process that are closed within a time, and a process that exits within one.

A peer that is gone, a thread that hangs, a task that does not let itself be cancelled: none of them may keep a process
alive that was told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Final

_logger = logging.getLogger(__name__)
EXIT_S: Final = 12.0
"""Seconds beyond its drain grace that a service may take to exit. The chart kills a pod 15 s after the grace."""
CLOSE_S: Final = 4.0
"""Seconds that a service gives its parts to close after its server has stopped."""
STUCK_EXIT_STATUS: Final = 70
_LAST_RESORT_S: Final = 1.0


async def close_within(timeout_s: float, **parts: Awaitable[object]) -> None:
    """Close all parts at the same time, each within ``timeout_s``; what goes wrong is logged by name."""
    tasks = {asyncio.ensure_future(closing): name for name, closing in parts.items()}
    done, stuck = await asyncio.wait(tasks, timeout=timeout_s)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("closing %s failed", tasks[task], exc_info=error)
    for task in stuck:
        _logger.error("%s did not close within %g s; going on without", tasks[task], timeout_s)
        task.cancel()


class StopEvent(asyncio.Event):
    """An event that is set when a service stops. From then on its process lives for a limited time, whatever hangs."""

    def __init__(self, *, drain_grace_s: float) -> None:
        super().__init__()
        self._limit_s = drain_grace_s + EXIT_S

    def set(self) -> None:
        """Begin to stop, and have the process end in a limited time, whatever hangs."""
        if not self.is_set():
            _end_process_after(self._limit_s)
        super().set()


def _end_process_after(limit_s: float) -> None:
    # A thread, because the event loop may be what hangs; a timer that needs no interpreter, because that may hang, too.
    threading.Thread(target=_end_process, args=(limit_s, _running_loop()), name="exit watchdog", daemon=True).start()
    with contextlib.suppress(ValueError, OSError, AttributeError):  # standard error is no file
        faulthandler.dump_traceback_later(limit_s + _LAST_RESORT_S, exit=True)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _end_process(limit_s: float, loop: asyncio.AbstractEventLoop | None) -> None:
    time.sleep(limit_s)
    _logger.critical("still alive %g s after it was told to stop: ending this process; what it does:", limit_s)
    for task in asyncio.all_tasks(loop) if loop is not None else ():
        task.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(STUCK_EXIT_STATUS)
