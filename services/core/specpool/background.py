"""Background tasks that are watched: none of them ends without a word.

An asyncio task that nobody awaits keeps its exception to itself. Whoever runs something beside the calls of its clients
does it through a `Background`::

    background = Background("router sessions")
    background.keep_running(self._renew, name="renewal")    # goes on until `close`, whatever happens in it
    background.run(self._pair(lease), name="pairing")       # one piece of work; a failure is logged
    await background.close()
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from specpool.backoff import Backoff

_logger = logging.getLogger(__name__)
_CLOSE_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 10.0
_HEALTHY_S: Final = 60.0
"""Seconds after which work that went well is started again quickly."""


class Background:
    """The background tasks of one part of a process."""

    def __init__(self, owner: str, *, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self._owner = owner
        self._first_pause_s = first_pause_s
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Number of tasks that run."""
        return len(self._tasks)

    def keep_running(self, work: Callable[[], Awaitable[None]], *, name: str) -> asyncio.Task[None]:
        """Run ``work()``, and again after a pause whenever it raises; when it returns, it is done."""
        return self._add(self._restarting(work, name), name)

    def run(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run ``work`` once; what it raises is logged."""
        return self._add(self._logged(work, name), name)

    async def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Cancel what runs and wait until it has ended, no longer than ``timeout_s``."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=timeout_s)
            for task in stuck:
                _logger.error("%s: %s did not end in %g s", self._owner, task.get_name(), timeout_s)

    def _add(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _restarting(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        loop = asyncio.get_running_loop()
        backoff = Backoff(first_s=self._first_pause_s, longest_s=_LONGEST_PAUSE_S)
        while True:
            started = loop.time()
            try:
                return await work()
            except Exception:
                if loop.time() - started > _HEALTHY_S:
                    backoff.reset()
                pause_s = backoff.next_s()
                _logger.exception("%s: %s failed; it starts again in %.1f s", self._owner, name, pause_s)
            await asyncio.sleep(pause_s)

    async def _logged(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception:
            _logger.exception("%s: %s failed", self._owner, name)
