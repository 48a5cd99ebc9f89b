"""A stream that outlives its connection: when a router stops or is lost, the rest comes from another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from specpool.backoff import Backoff
from specpool.errors import Draining, Overloaded, SpecPoolError
from specpool.rpc.errors import from_rpc_error, has_details
from specpool.v1 import inference_pb2

# What gRPC itself reports of a connection that broke; with details these codes are the router's own answer.
_BROKEN: Final = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_TAKEN_OVER: Final = "SESSION_TAKEN_OVER"
_IN_USE: Final = "REQUEST_ID_IN_USE"
Request = inference_pb2.GenerateRequest | inference_pb2.ResumeRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePolicy:
    """How hard a client tries to get the rest of a stream that was cut."""

    max_tries: int = 10
    """Most tries in a row that bring nothing; 0: never resume."""
    max_seconds: float = 60.0
    """Longest time in seconds without anything new."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0


class ResumableStream:
    """The events of one generation, from as many connections as it takes."""

    def __init__(self, request: inference_pb2.GenerateRequest, policy: ResumePolicy) -> None:
        self._request = inference_pb2.GenerateRequest()
        self._request.CopyFrom(request)
        self._policy = policy
        self._has_started = False
        self._has_finished = False
        self._token_ids: list[int] = []
        self._num_chars = 0
        self._num_tries = 0
        self._cut_s = 0.0
        self._backoff = Backoff(first_s=policy.first_pause_s, longest_s=policy.longest_pause_s)

    async def events(
        self, call_of: Callable[[Request, bool], Awaitable[Any]]
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The events until the end of the answer; leaving early cancels it.

        Args:
            call_of: makes the call of a request, over a new connection if it is told True.
        """
        is_new = False
        while True:
            call = await call_of(self._next_request(), is_new)
            try:
                async for event in call:
                    if (new := self._take_in(event)) is not None:
                        yield new
                return
            except grpc.aio.AioRpcError as error:
                if self._has_finished:  # all that was cut is the status
                    return
                typed = from_rpc_error(error)
                remaining_s = self._remaining_s() if self._may_go_on(error, typed) else 0.0
                if remaining_s <= 0:
                    raise typed from error
            finally:
                call.cancel()
            self._num_tries += 1
            await asyncio.sleep(min(self._backoff.next_s(), remaining_s))
            is_new = True

    def _next_request(self) -> Request:
        if not self._has_started:
            return self._request
        return inference_pb2.ResumeRequest(
            request_id=self._request.request_id,
            num_tokens_received=len(self._token_ids),
            num_chars_received=self._num_chars,
            received_token_ids=self._token_ids,
            request=self._request,
        )

    def _remaining_s(self) -> float:
        """Seconds for which it may still be tried."""
        now_s = asyncio.get_running_loop().time()
        if self._num_tries == 0:
            self._cut_s = now_s
        return self._cut_s + self._policy.max_seconds - now_s if self._num_tries < self._policy.max_tries else 0.0

    def _take_in(
        self, event: inference_pb2.GenerateResponse | inference_pb2.ResumeResponse
    ) -> inference_pb2.GenerateResponse | None:
        """The event for the caller, who needs to hear but once that it has started."""
        if event.HasField("started"):
            if self._has_started:
                return None
            self._has_started = True
            started = event.started
            self._request.request_id, self._request.model = started.request_id, started.model
            self._request.sampling.seed = started.seed
        else:
            self._num_tries = 0
            self._backoff.reset()
            self._token_ids.extend(event.delta.token_ids)
            self._num_chars += len(event.delta.text)
            self._has_finished = event.HasField("finished")
        if isinstance(event, inference_pb2.GenerateResponse):
            return event
        if event.HasField("delta"):
            return inference_pb2.GenerateResponse(delta=event.delta)
        return inference_pb2.GenerateResponse(finished=event.finished)

    def _may_go_on(self, error: grpc.aio.AioRpcError, typed: SpecPoolError) -> bool:
        """Whether the stream was cut, rather than the request refused; one that did not begin may begin elsewhere."""
        if not self._has_started:
            # The id may be in use by the try before, which the router that stopped has still to take back.
            is_ours = self._num_tries > 0 and typed.reason == _IN_USE
            return is_ours or isinstance(typed, Draining | Overloaded)
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return typed.reason != _TAKEN_OVER
        return error.code() in _BROKEN and not has_details(error)
