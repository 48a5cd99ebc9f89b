"""One request on its way from targets to the client: the stream goes on when its target is lost.

The next target continues from the committed tokens with the same seed, so it commits the same tokens; it is told how
many characters the client has, and emits what the lost one still held back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from specpool.errors import Draining, EngineFailed, SpecPoolError, TargetUnavailable
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster, Pod
from specpool_router.placement.pod_choice import Candidate, choose_speculator, choose_target
from specpool_router.sessions.session_store import SessionState
from specpool_router.sessions.sessions import Lease, Sessions

_logger = logging.getLogger(__name__)
_MAX_FRUITLESS_FAILOVERS: Final = 5
"""In a row, without a single new token: the request itself may be what breaks targets."""
_OVERLOADED: Final = "TARGET_OVERLOADED"
# What gRPC itself reports when a peer dies; with an ErrorInfo these codes are a target's own answer.
_LOST_CODES: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_Target = Pod[target_pb2.GetTargetStatusResponse]
Event = target_pb2.RunSequenceResponse


class _TargetLost(Exception):
    """The target went away; another may continue."""


class _TargetBusy(Exception):
    """The target has as many requests as it takes; another may have room."""

    def __init__(self, error: SpecPoolError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(slots=True)
class Progress:
    """What the client has."""

    token_ids: list[int] = field(default_factory=list)
    num_chars: int = 0
    started: bool = False
    num_prompt_tokens: int = 0

    def add(self, delta: inference_pb2.GenerationDelta) -> None:
        """One more delta."""
        self.token_ids.extend(delta.token_ids)
        self.num_chars += len(delta.text)


class Stream:
    """Runs one request. `events` is what the client sees."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        cluster: Cluster,
        sessions: Sessions,
        metrics: RouterMetrics,
        failover_wait_s: float,
        progress: Progress | None = None,
    ) -> None:
        self.request = request
        self.lease: Lease | None = None
        self._cluster = cluster
        self._sessions = sessions
        self._metrics = metrics
        self._failover_wait_s = failover_wait_s
        self._progress = progress or Progress()
        self._call: Any = None
        self._stopped: SessionState | None = None
        self._held_text = ""

    def stop(self, state: SessionState) -> None:
        """Stop it from outside: CANCELLED ends the client's stream politely, FAILED means another has taken over."""
        self._stopped = self._stopped or state
        if self._call is not None:
            self._call.cancel()

    def _is_stopped(self) -> bool:
        return self._stopped is not None

    async def events(self) -> AsyncGenerator[Event, None]:
        """`started`, deltas, `finished`: from as many targets as it takes."""
        lost: set[str] = set()
        busy: dict[str, _TargetBusy] = {}
        num_fruitless, wait_s = 0, 0.0
        while not self._is_stopped():
            try:
                pod, speculator = await self._choose(lost | busy.keys(), wait_s)
            except TargetUnavailable as error:
                if self._is_stopped():
                    break
                raise next((each.error for each in busy.values()), error) from error
            if self._is_stopped():
                break
            num_tokens = len(self._progress.token_ids)
            try:
                async with aclosing(self._run_on(pod, speculator)) as events:
                    async for event in events:
                        yield event
                        if event.HasField("finished"):
                            return
            except _TargetBusy as error:
                num_fruitless += 1
                if num_fruitless >= _MAX_FRUITLESS_FAILOVERS:
                    raise error.error from error
                busy[pod.endpoint.address] = error
            except _TargetLost as error:
                if self._is_stopped():
                    break
                _logger.warning("%s lost its target %s: %s", self.request.request_id, pod.endpoint.address, error)
                num_fruitless = 0 if len(self._progress.token_ids) > num_tokens else num_fruitless + 1
                if num_fruitless >= _MAX_FRUITLESS_FAILOVERS:
                    raise TargetUnavailable(f"the request lost its target {num_fruitless} times: {error}") from error
                self._metrics.failover()
                lost, wait_s = {pod.endpoint.address}, self._failover_wait_s
        for event in self._rest_of_text():
            yield event
        yield self._finished_early()

    async def _choose(self, lost: set[str], wait_s: float) -> tuple[_Target, str]:
        """A target and a speculator's endpoint (or none), waiting up to ``wait_s`` for a target to turn up."""
        targets = self._cluster.targets
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            remaining_s = deadline - asyncio.get_running_loop().time()
            try:
                chosen = self._choose_now(targets.candidates(), lost)
            except TargetUnavailable:
                if remaining_s <= 0 or self._is_stopped():
                    raise
                await targets.wait_for_change(min(remaining_s, 0.25))
                lost = set()  # it may be the only one, and be back: it is unreachable until it answers again
                continue
            pod = targets.get(chosen.endpoint)
            assert pod is not None
            return pod, self._speculator_for(chosen)

    def _choose_now(self, candidates: list[Candidate], lost: set[str]) -> Candidate:
        return choose_target(candidates, model=self.request.model, session_id=self.request.session_id, exclude=lost)

    def _speculator_for(self, target: Candidate) -> str:
        if self.request.mode == types_pb2.SPECULATION_MODE_OFF:
            return ""
        speculator = choose_speculator(self._cluster.speculators.candidates(), target)
        return speculator.endpoint if speculator else ""

    async def _run_on(self, pod: _Target, speculator: str) -> AsyncGenerator[Event, None]:
        """Events of one target, without what the client has already."""
        assert self.lease is not None
        self._sessions.pair(self.lease, pod.endpoint.address, speculator)
        stub: Any = target_pb2_grpc.TargetServiceStub(pod.channel)
        call = stub.RunSequence(self._run_request(speculator))
        self._call = call
        pod.num_streams += 1
        try:
            while (event := await self._read(call, pod)) is not grpc.aio.EOF:
                for shown in self._take_in(event):
                    yield shown
            raise self._lost(pod, "it ended the stream early")
        finally:
            pod.num_streams -= 1
            call.cancel()

    async def _read(self, call: Any, pod: _Target) -> Any:
        try:
            return await call.read()
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            if typed.reason == _OVERLOADED:
                raise _TargetBusy(typed) from error
            if not _is_loss(error, typed):
                raise typed from error
            raise self._lost(pod, str(typed)) from error
        except asyncio.CancelledError:
            if not self._is_stopped():
                raise
            raise _TargetLost("stopped") from None

    def _lost(self, pod: _Target, why: str) -> _TargetLost:
        if not self._is_stopped():
            self._cluster.targets.mark_lost(pod, why)
        return _TargetLost(why)

    def _run_request(self, speculator: str) -> target_pb2.RunSequenceRequest:
        assert self.lease is not None
        tenant = self.lease.tenant
        return target_pb2.RunSequenceRequest(
            request=self.request,
            tenant=tenant.name,
            tenant_weight=tenant.weight,
            cache_salt=tenant.cache_salt,
            speculator_endpoint=speculator,
            speculators=self._cluster.speculator_endpoints,
            committed_token_ids=self._progress.token_ids,
            num_text_chars_sent=self._progress.num_chars,
        )

    def _take_in(self, event: Event) -> Iterator[Event]:
        """Note what came; gives what the client sees of it."""
        assert self.lease is not None
        progress = self._progress
        if event.HasField("started"):
            if not progress.started:
                progress.num_prompt_tokens = event.started.num_prompt_tokens
                self._sessions.count_tokens(self.lease, progress.num_prompt_tokens)
                progress.started = True
                yield event
        elif event.HasField("paired"):
            self._sessions.pair(self.lease, self.lease.session.target, event.paired.endpoint)
        elif event.HasField("delta"):
            progress.add(event.delta)
            # Text without tokens travels with the next token, so that a count of tokens says what text a client has.
            event.delta.text = self._held_text + event.delta.text
            self._held_text = "" if event.delta.token_ids else event.delta.text
            if event.delta.token_ids:
                yield self._journaled(event)
        elif event.HasField("finished"):
            yield from self._rest_of_text()
            event.finished.usage.num_completion_tokens = len(progress.token_ids)
            yield event

    def _rest_of_text(self) -> Iterator[Event]:
        if self._held_text:
            yield self._journaled(Event(delta=inference_pb2.GenerationDelta(text=self._held_text)))
            self._held_text = ""

    def _journaled(self, event: Event) -> Event:
        assert self.lease is not None
        self._sessions.append(self.lease, event.delta.SerializeToString(), len(event.delta.token_ids))
        return event

    def _finished_early(self) -> Event:
        if self._stopped is not SessionState.CANCELLED:
            raise TargetUnavailable("another stream resumed this request", reason="SESSION_TAKEN_OVER")
        usage = types_pb2.Usage(
            num_prompt_tokens=self._progress.num_prompt_tokens, num_completion_tokens=len(self._progress.token_ids)
        )
        return Event(
            finished=inference_pb2.GenerationFinished(finish_reason=types_pb2.FINISH_REASON_CANCELLED, usage=usage)
        )


def _is_loss(error: grpc.aio.AioRpcError, typed: SpecPoolError) -> bool:
    """Whether the target is gone or goes, rather than the request being at fault."""
    if isinstance(typed, EngineFailed | Draining | TargetUnavailable):
        return True
    has_details = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    return error.code() in _LOST_CODES and not has_details
