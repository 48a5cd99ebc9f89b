"""Requests from all doors. A door says who calls (a `Tenant`) and gets events; what it leaves early is cancelled.

A new request: a place in the quota, the request completed, its session opened, its stream run with the session's lease.
A resumed one: its session taken over, the journal replayed, the stream run from there.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final

from specpool.errors import SessionNotFound, SessionStoreUnavailable
from specpool.request_limits import check_prompt_size, check_request, invalid_value
from specpool.v1 import inference_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.generation.admission import Admission
from specpool_router.generation.progress import Progress, Received
from specpool_router.generation.resume_point import Gap, Journal, ResumePoint, check_can_regenerate, regenerated
from specpool_router.generation.shared_streams import SharedStreams
from specpool_router.generation.stop_signal import StopSignal
from specpool_router.generation.stream import Patience, Stream
from specpool_router.generation.stream_recording import annotate, recording
from specpool_router.generation.target_run import Event
from specpool_router.generation.target_search import wait_for_model
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.session_store import Session
from specpool_router.sessions.sessions import Sessions

_SEED_BITS: Final = 53
"""Bits of a drawn seed: few enough to stay exact in JSON, whose numbers are doubles."""


class Generations:
    """Runs all requests of this router."""

    def __init__(
        self,
        *,
        admission: Admission,
        cluster: Cluster,
        sessions: Sessions,
        metrics: RouterMetrics,
        patience: Patience,
    ) -> None:
        self._admission = admission
        self._cluster = cluster
        self._sessions = sessions
        self._metrics = metrics
        self._patience = patience
        self._targets = SharedStreams()

    async def generate(self, tenant: Tenant, request: inference_pb2.GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of a new request."""
        owner = uuid.uuid4().hex
        async with self._admission.stream() as stop, self._admission.place(tenant, owner):
            request = await self._completed(request, stop)
            annotate(request, tenant)
            lease = await self._sessions.open(_session(request, tenant, owner), tenant, stop.stop)
            stream = self._stream(request, lease, stop, Progress())
            with recording(self._sessions, lease) as record:
                async with aclosing(stream.events()) as events:
                    async for event in events:
                        record.add(event)
                        yield event

    async def resume(self, tenant: Tenant, point: ResumePoint) -> AsyncGenerator[Event, None]:
        """The events that the client lacks of a request that began before."""
        owner = uuid.uuid4().hex
        async with self._admission.stream() as stop:
            session = await self._find(tenant, point)
            if session is not None and not session.ending:
                async with self._admission.place(tenant, owner, instead_of=session.owner):
                    session = await self._sessions.take_over(point.request_id, tenant, owner)
                    if not session.ending:
                        async with aclosing(self._resumed(tenant, session, point, stop)) as events:
                            async for event in events:
                                yield event
                        return
            if session is None:
                async with (
                    self._admission.place(tenant, owner),
                    aclosing(self._begun_elsewhere(tenant, owner, point, stop)) as events,
                ):
                    async for event in events:
                        yield event
                return
            async for event in self._replayed(session, point):
                yield event

    async def cancel(self, tenant: Tenant, request_id: str) -> bool:
        """Cancel a running request, here or on another router; False if there is none."""
        return await self._sessions.cancel(request_id, tenant)

    async def _find(self, tenant: Tenant, point: ResumePoint) -> Session | None:
        """The session of a request; None if it is lost and the client sent the request along."""
        try:
            return await self._sessions.find(point.request_id, tenant)
        except (SessionNotFound, SessionStoreUnavailable) as error:
            # A store that is there and lags knows the session, and would not let it begin anew.
            is_behind = isinstance(error, SessionStoreUnavailable) and self._sessions.reachable
            if point.request is None or is_behind:
                raise
            return None

    async def _replayed(self, session: Session, point: ResumePoint) -> AsyncGenerator[Event, None]:
        """The rest of an answer that is complete, from its journal."""
        journal = Journal(await self._sessions.store.read_journal(session.request_id))
        journal.check_ended(point)
        yield _started(inference_pb2.GenerateRequest.FromString(session.request))
        for event in _replay(journal, Received(point.num_tokens, point.num_chars)):
            yield event
        yield Event(finished=inference_pb2.GenerationFinished.FromString(session.ending))

    async def _resumed(
        self, tenant: Tenant, session: Session, point: ResumePoint, stop: StopSignal
    ) -> AsyncGenerator[Event, None]:
        """The rest of an answer whose session was taken over."""
        request = inference_pb2.GenerateRequest.FromString(session.request)
        journal = Journal(await self._sessions.store.read_journal(session.request_id))
        if not journal.agrees_with(point):
            if point.token_ids is None:
                check_can_regenerate(request, journal, point)
            else:
                journal.cut_to(point.token_ids)
        lease = self._sessions.reopen(session, journal.entries, tenant, stop.stop)
        async with aclosing(self._continued(request, lease, journal, point, stop)) as events:
            async for event in events:
                yield event

    async def _begun_elsewhere(
        self, tenant: Tenant, owner: str, point: ResumePoint, stop: StopSignal
    ) -> AsyncGenerator[Event, None]:
        """The rest of an answer whose session is lost."""
        request = await self._completed(_original(point), stop)
        if point.token_ids is None:
            check_can_regenerate(request, Journal(()), point)
        lease = await self._sessions.adopt(_session(request, tenant, owner), tenant, stop.stop)
        async with aclosing(self._continued(request, lease, Journal(()), point, stop)) as events:
            async for event in events:
                yield event

    async def _continued(
        self,
        request: inference_pb2.GenerateRequest,
        lease: Lease,
        journal: Journal,
        point: ResumePoint,
        stop: StopSignal,
    ) -> AsyncGenerator[Event, None]:
        """What the client lacks of the journal, then of what targets make of it."""
        annotate(request, lease.tenant)
        received = Received(point.num_tokens, point.num_chars)
        with recording(self._sessions, lease) as record:
            yield _started(request)
            for event in _replay(journal, received):
                yield event
            async with aclosing(self._after(journal, request, lease, point, stop)) as events:
                async for event in events:
                    record.add(event)
                    shown = received.rest_of_event(event)
                    if shown is not None:
                        yield shown

    async def _after(
        self,
        journal: Journal,
        request: inference_pb2.GenerateRequest,
        lease: Lease,
        point: ResumePoint,
        stop: StopSignal,
    ) -> AsyncGenerator[Event, None]:
        """The events that follow the journal, tokens that only the client has included."""
        token_ids = journal.token_ids if journal.agrees_with(point) else point.token_ids
        if token_ids is None:
            progress = Gap(journal, journal.token_ids).progress
            async with aclosing(self._stream(request, lease, stop, progress).events()) as events:
                token_ids = await regenerated(events, progress, point.num_tokens)
        gap = Gap(journal, token_ids)
        async with aclosing(self._stream(request, lease, stop, gap.progress).events()) as events:
            async for event in events:
                for filled in gap.fill(event):
                    yield filled

    def _stream(
        self, request: inference_pb2.GenerateRequest, lease: Lease, stop: StopSignal, progress: Progress
    ) -> Stream:
        return Stream(
            request,
            lease,
            stop,
            progress,
            cluster=self._cluster,
            sessions=self._sessions,
            metrics=self._metrics,
            patience=self._patience,
            targets=self._targets,
        )

    async def _completed(
        self, request: inference_pb2.GenerateRequest, stop: StopSignal
    ) -> inference_pb2.GenerateRequest:
        """A copy with model, id and seed filled in: what another target or router needs to continue the request."""
        check_request(request)
        wait_s = self._patience.request_wait_s
        model = await wait_for_model(self._cluster, stop, request.model, wait_s=wait_s)
        self._check_prompt_size(request, model)
        completed = inference_pb2.GenerateRequest()
        completed.CopyFrom(request)
        completed.model = model
        completed.request_id = request.request_id or uuid.uuid4().hex
        if not completed.sampling.HasField("seed"):
            completed.sampling.seed = secrets.randbits(_SEED_BITS)
        return completed

    def _check_prompt_size(self, request: inference_pb2.GenerateRequest, model: str) -> None:
        """Refuse a prompt that no target could take: it is not stored, and passed on to nobody."""
        infos = [pod.status.model for pod in self._cluster.targets.all() if pod.status is not None]
        serving = [info for info in infos if info.name == model]
        if serving and all(info.max_prompt_chars for info in serving):
            check_prompt_size(
                request,
                max_context=max(info.max_context for info in serving),
                max_prompt_chars=max(info.max_prompt_chars for info in serving),
            )


def _session(request: inference_pb2.GenerateRequest, tenant: Tenant, owner: str) -> Session:
    return Session(request_id=request.request_id, tenant=tenant.name, owner=owner, request=request.SerializeToString())


def _original(point: ResumePoint) -> inference_pb2.GenerateRequest:
    """The request that a client sends along to resume, fit to continue what it has."""
    assert point.request is not None, "else the session must be known"
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(point.request)
    if request.request_id not in ("", point.request_id):
        accepted = f"{point.request_id!r}, the id to resume, or empty"
        raise invalid_value("request.request_id", request.request_id, accepted)
    request.request_id = point.request_id
    if point.num_tokens and request.sampling.temperature > 0 and not request.sampling.HasField("seed"):
        raise invalid_value("request.sampling.seed", "unset", "the seed that `started` named")
    return request


def _replay(journal: Journal, received: Received) -> Iterator[Event]:
    for delta in journal.deltas:
        rest = received.rest_of(delta)
        if rest is not None:
            yield Event(delta=rest)


def _started(request: inference_pb2.GenerateRequest) -> Event:
    return Event(
        started=inference_pb2.GenerationStarted(
            request_id=request.request_id, model=request.model, seed=request.sampling.seed
        )
    )
