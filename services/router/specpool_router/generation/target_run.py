"""One request at one target: its events, and how it may end before it is finished.

The target is lost (`TargetLost`), does not run the request now (`TargetRefused`), or says what is wrong with the
request (any `SpecPoolError`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc
import grpc.aio

from specpool.errors import Draining, EngineFailed, Overloaded, SpecPoolError, TargetUnavailable
from specpool.rpc.errors import from_rpc_error, has_details
from specpool.v1 import target_pb2
from specpool_router.generation.shared_streams import Call, SharedStreams
from specpool_router.placement.pods import Pod

Event = target_pb2.RunSequenceResponse
Target = Pod[target_pb2.GetTargetStatusResponse]
OVERLOADED: Final = "TARGET_OVERLOADED"
# What gRPC itself reports when a peer dies; with details these codes are a target's own answer.
_LOST_CODES: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class TargetLost(Exception):
    """The target went away; another may continue."""

    def __init__(self, why: str, *, ran: bool) -> None:
        super().__init__(why)
        self.ran = ran
        """Whether the request ran there, so that it may be what the target was lost of."""


class TargetRefused(Exception):
    """The target is well and does not run the request now; another may, or the same one later."""

    def __init__(self, error: SpecPoolError, *, ran: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.ran = ran
        """Whether the request ran there before."""


class TargetRun:
    """The call of one request at one target."""

    def __init__(
        self,
        target: Target,
        request: target_pb2.RunSequenceRequest,
        streams: SharedStreams,
        *,
        progress_timeout_s: float,
    ) -> None:
        self._target = target
        self._streams = streams
        self._request = request
        self._progress_timeout_s = progress_timeout_s
        self._loop = asyncio.get_running_loop()
        self._call: Call | None = None
        self._is_cancelled = False
        self._is_stuck = False
        self._ran = False
        self._waiting_since_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """End the call; `events` raises `TargetLost`."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events until the target ends the stream; raises `TargetLost` then, unless the caller has left before."""
        call = self._call = self._streams.call(self._target, self._request)
        self._target.num_streams += 1
        self._watch(self._progress_timeout_s)
        try:
            while (event := await self._next(call)) is not grpc.aio.EOF:
                self._ran = self._ran or event.HasField("started")
                yield event
            raise TargetLost("it ended the stream early", ran=self._ran)
        finally:
            self._target.num_streams -= 1
            if self._timer is not None:
                self._timer.cancel()
            call.cancel()

    async def _next(self, call: Call) -> Any:
        self._waiting_since_s = self._loop.time()
        try:
            event = await call.read()
        except grpc.aio.AioRpcError as error:
            raise self._ending(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():  # the caller is cancelled, whatever happens to the call
                raise
            raise self._cancelled() from None
        finally:
            self._waiting_since_s = None
        self._target.heard_s = self._loop.time()
        return event

    def _cancelled(self) -> TargetLost:
        """The loss that a cancelled call means: cancelled here for one of these reasons, or with its channel."""
        if self._is_stuck:
            return TargetLost(f"it showed no sign of life for {self._progress_timeout_s:g} s", ran=self._ran)
        return TargetLost("the stream was stopped" if self._is_cancelled else "its channel was closed", ran=False)

    def _watch(self, in_s: float) -> None:
        self._timer = self._loop.call_later(in_s, self._check_life)

    def _check_life(self) -> None:
        """Cancel the call if the target does nothing at all any more; a queue or a prefill may be long."""
        now_s = self._loop.time()
        # Between two reads it is the client that is waited for.
        since_s = now_s if self._waiting_since_s is None else self._waiting_since_s
        silent_s = now_s - max(since_s, self._target.progressed_s, self._target.heard_s)
        if silent_s < self._progress_timeout_s:
            self._watch(self._progress_timeout_s - silent_s)
            return
        self._is_stuck = True
        if self._call is not None:
            self._call.cancel()

    def _ending(self, error: grpc.aio.AioRpcError) -> Exception:
        """The exception for an error of the call: a loss, a refusal, or what the target says of the request itself."""
        typed = from_rpc_error(error)
        if self._is_stuck or self._is_cancelled:
            return TargetLost(str(typed), ran=self._is_stuck and self._ran)
        if typed.reason == OVERLOADED or isinstance(typed, Draining | Overloaded):
            return TargetRefused(typed, ran=self._ran)
        if error.code() is grpc.StatusCode.CANCELLED and not has_details(error):  # the call's end, not the target's
            return TargetRefused(typed, ran=self._ran)
        if isinstance(typed, EngineFailed | TargetUnavailable):
            return TargetLost(str(typed), ran=self._ran)
        if has_details(error):
            return typed
        return TargetLost(str(typed), ran=self._ran) if error.code() in _LOST_CODES else typed
