"""One target's stream: responses from the engine thread on their way to the network."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

from specpool.v1 import speculator_pb2, types_pb2

_MAX_WAITING_ADVICE: Final = 256
"""Tables and loads are advice: beyond this a target that does not read gets no more of them."""
_MAX_WAITING: Final = 1024
"""All else answers a message: a target that does not read that many is not listened to."""


class Connection:
    """Queue of responses to one target. `deliver` may be called from any thread, the rest from the event loop."""

    def __init__(self, target: types_pb2.Peer) -> None:
        self.target = target
        """The target at the other end, as it said in its hello."""
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[speculator_pb2.SpeculateResponse] = deque()
        self._wake = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False

    def deliver(self, responses: Sequence[speculator_pb2.SpeculateResponse]) -> None:
        """Hand responses over to the event loop, in order."""
        try:
            self._loop.call_soon_threadsafe(self.send, *responses)
        except RuntimeError:  # the loop is closed: the process is ending
            return

    def send(self, *responses: speculator_pb2.SpeculateResponse) -> None:
        """Queue responses."""
        for response in responses:
            is_advice = response.HasField("tables") or response.HasField("load")
            if len(self._waiting) < _MAX_WAITING_ADVICE or not is_advice:
                self._waiting.append(response)
        if len(self._waiting) >= _MAX_WAITING:
            self._has_room.clear()
        self._wake.set()

    def close(self) -> None:
        """End the stream after what is queued."""
        self._is_closed = True
        self._wake.set()

    async def next_response(self) -> speculator_pb2.SpeculateResponse | None:
        """The next response to send; None at the end."""
        while not self._waiting:
            if self._is_closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        self._has_room.set()
        return self._waiting.popleft()

    async def wait_for_room(self) -> None:
        """Wait until not too much waits for the target; whoever reads its stream waits here no longer than that."""
        await self._has_room.wait()
