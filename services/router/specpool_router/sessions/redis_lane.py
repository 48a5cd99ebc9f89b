"""One ordered lane of script calls and reads to Redis: what waits together travels together.

A router with thousands of streams needs neither a connection nor a round trip for each of them. A lane sends its
commands over one connection in the order in which they were asked for, as many at once as wait, and the next batch when
the former one is answered. The order holds for callers that stopped waiting, too: what was asked for is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import NoScriptError, RedisError

from specpool_router.sessions.redis_scripts import ALL, Script

_logger = logging.getLogger(__name__)
_MAX_COMMANDS: Final = 256
_MAX_BYTES: Final = 1 << 20
"""Bytes of a batch's commands, at which it is sent; its last command may exceed them."""
_BATCH_S: Final = 5.0
"""Longest time for one batch, its retry included."""

_Command = tuple[object, ...]


class RedisLane:
    """Sends commands in order. Each may be sent twice, so that it must do no harm the second time."""

    def __init__(self, client: Any, *, max_commands: int = _MAX_COMMANDS, max_bytes: int = _MAX_BYTES) -> None:
        self._client = client
        self._max_commands = max_commands
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[_Command, asyncio.Future[Any]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[object]) -> Any:
        """Run a script; raises what redis-py raises, or OSError."""
        return await self.send("EVALSHA", script.sha, len(keys), *keys, *arguments)

    async def send(self, *command: object) -> Any:
        """Send any command; raises what redis-py raises, or OSError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_waiting(), name="session store")
        return await future

    async def close(self) -> None:
        """Stop; commands that wait fail."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender], timeout=_BATCH_S)
        self._fail(self._waiting, ConnectionError("the connection was closed"))

    async def _send_waiting(self) -> None:
        while self._waiting:
            batch = self._take_batch()
            try:
                async with asyncio.timeout(_BATCH_S):
                    results = await self._execute([command for command, _ in batch])
            except BaseException as error:  # nobody who waits may be forgotten, whatever it was
                if not isinstance(error, RedisError | OSError | asyncio.CancelledError):
                    _logger.exception("a batch of commands failed")
                # What waits would fail as slowly, one batch after the other.
                self._fail((*batch, *self._waiting), _as_failure(error))
                self._waiting.clear()
                if isinstance(error, asyncio.CancelledError):
                    raise
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    _settle(future, result)

    def _take_batch(self) -> list[tuple[_Command, asyncio.Future[Any]]]:
        batch: list[tuple[_Command, asyncio.Future[Any]]] = []
        num_bytes = 0
        while self._waiting and len(batch) < self._max_commands and num_bytes < self._max_bytes:
            batch.append(self._waiting.popleft())
            num_bytes += sum(len(part) for part in batch[-1][0] if isinstance(part, bytes))
        return batch

    async def _execute(self, commands: Sequence[_Command]) -> list[Any]:
        """The server's answers, or its exceptions. A server that lost the scripts gets them again."""
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        results: list[Any] = await pipeline.execute(raise_on_error=False)
        missing = next((i for i, result in enumerate(results) if isinstance(result, NoScriptError)), None)
        if missing is None:
            return results
        for script in ALL:
            pipeline.script_load(script.text)
        for command in commands[missing:]:  # in order, so that nothing overtakes the one that was not executed
            pipeline.execute_command(*command)
        again: list[Any] = await pipeline.execute(raise_on_error=False)
        return [*results[:missing], *again[len(ALL) :]]

    @staticmethod
    def _fail(waiting: Sequence[tuple[_Command, asyncio.Future[Any]]], error: Exception) -> None:
        for _, future in waiting:
            _settle(future, error)


def _as_failure(error: BaseException) -> Exception:
    if isinstance(error, TimeoutError):
        return TimeoutError(f"no answer in {_BATCH_S:g} s")
    return error if isinstance(error, RedisError | OSError) else ConnectionError(f"{type(error).__name__}: {error}")


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
