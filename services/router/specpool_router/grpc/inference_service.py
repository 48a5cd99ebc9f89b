"""InferenceService: what clients call."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Final

from opentelemetry import trace

from specpool.errors import Draining, InvalidArgument, SpecPoolError
from specpool.telemetry import tracing
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from specpool_router.auth.tenants import Tenant, Tenants
from specpool_router.generation.stream import Event, Progress, Stream
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster
from specpool_router.placement.pod_choice import resolve_model
from specpool_router.sessions.session_store import Session, SessionState
from specpool_router.sessions.sessions import Lease, Sessions

_MAX_REQUEST_ID_CHARS: Final = 128
_SEED_BITS: Final = 53
"""A drawn seed stays exact in JSON, whose numbers are doubles."""


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Authenticates, admits, runs streams, resumes and cancels them."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        sessions: Sessions,
        tenants: Tenants,
        metrics: RouterMetrics,
        failover_wait_s: float,
    ) -> None:
        self.num_streams = 0
        self._cluster = cluster
        self._sessions = sessions
        self._tenants = tenants
        self._metrics = metrics
        self._failover_wait_s = failover_wait_s
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def start_draining(self) -> None:
        """Take nothing new."""
        self._draining = True

    async def wait_until_idle(self) -> None:
        """Return when no stream runs."""
        await self._idle.wait()

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """See the proto."""
        tenant = self._admittable(context)
        request = self._completed(request)
        _annotate(request, tenant)
        session = Session(
            request_id=request.request_id,
            tenant=tenant.name,
            owner=uuid.uuid4().hex,
            request=request.SerializeToString(),
        )
        stream = self._stream(request)
        async with self._counted(), self._place(tenant, session.owner):
            stream.lease = await self._sessions.open(session, tenant, stream.stop)
            async with aclosing(self._events(stream)) as events:
                async for event in events:
                    yield _as(inference_pb2.GenerateResponse, event)

    async def Resume(
        self, request: inference_pb2.ResumeRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.ResumeResponse, None]:
        """See the proto."""
        tenant = self._admittable(context)
        session = await self._sessions.find(request.request_id, tenant)
        async with self._counted(), AsyncExitStack() as stack:
            if not session.ending:
                owner = uuid.uuid4().hex
                await stack.enter_async_context(self._place(tenant, owner, instead_of=session.owner))
                session = await self._sessions.take_over(request.request_id, tenant, owner)
            journal = await self._sessions.store.read_journal(request.request_id)
            original = inference_pb2.GenerateRequest.FromString(session.request)
            progress = Progress()
            yield _as(inference_pb2.ResumeResponse, _started(original))
            for entry in journal:
                delta = inference_pb2.GenerationDelta.FromString(entry)
                if new := _after(delta, request.num_tokens_received - len(progress.token_ids)):
                    yield inference_pb2.ResumeResponse(delta=new)
                progress.add(delta)
            if session.ending:
                yield inference_pb2.ResumeResponse(finished=inference_pb2.GenerationFinished.FromString(session.ending))
                return
            progress.started = bool(journal)
            stream = self._stream(original, progress)
            stream.lease = self._sessions.reopen(session, journal, tenant, stream.stop)
            num_tokens = len(progress.token_ids)
            async with aclosing(self._events(stream)) as events:
                async for event in events:
                    if event.HasField("started"):
                        continue
                    if event.HasField("delta"):
                        new = _after(event.delta, request.num_tokens_received - num_tokens)
                        num_tokens += len(event.delta.token_ids)
                        if new is None:
                            continue
                        event = Event(delta=new)
                    yield _as(inference_pb2.ResumeResponse, event)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Any) -> inference_pb2.CancelResponse:
        """See the proto."""
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        return inference_pb2.CancelResponse(cancelled=await self._sessions.cancel(request.request_id, tenant))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """See the proto."""
        self._tenants.authenticate(context.invocation_metadata() or ())
        models: dict[str, types_pb2.ModelInfo] = {}
        for pod in self._cluster.targets.all():
            if pod.reachable and pod.status is not None:
                models.setdefault(pod.status.model.name, pod.status.model)
        return inference_pb2.ListModelsResponse(models=[models[name] for name in sorted(models)])

    def _admittable(self, context: Any) -> Tenant:
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        if self._draining:
            raise Draining("this router is draining and takes no new requests; call another")
        return tenant

    def _completed(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
        """A copy with model, request id and seed filled in: what another target or router needs to continue it."""
        completed = inference_pb2.GenerateRequest()
        completed.CopyFrom(request)
        completed.model = resolve_model(self._cluster.targets.candidates(), request.model)
        completed.request_id = request.request_id or uuid.uuid4().hex
        if len(completed.request_id) > _MAX_REQUEST_ID_CHARS or not completed.request_id.isprintable():
            accepted = f"up to {_MAX_REQUEST_ID_CHARS} printable characters"
            raise InvalidArgument(
                f"request_id must be {accepted}", metadata={"field": "request_id", "accepted": accepted}
            )
        if not completed.sampling.HasField("seed"):
            completed.sampling.seed = secrets.randbits(_SEED_BITS)
        return completed

    def _stream(self, request: inference_pb2.GenerateRequest, progress: Progress | None = None) -> Stream:
        return Stream(
            request,
            cluster=self._cluster,
            sessions=self._sessions,
            metrics=self._metrics,
            failover_wait_s=self._failover_wait_s,
            progress=progress,
        )

    async def _events(self, stream: Stream) -> AsyncGenerator[Event, None]:
        """The stream's events; whatever way it ends, the session knows."""
        lease = stream.lease
        assert lease is not None
        state, ending = SessionState.DETACHED, b""
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    if event.HasField("finished"):
                        state, ending = SessionState.FINISHED, event.finished.SerializeToString()
                        self._finished(lease, event.finished)
                    yield event
        except SpecPoolError:
            state = SessionState.FAILED
            raise
        finally:
            self._sessions.finish(lease, state, ending)

    def _finished(self, lease: Lease, finished: inference_pb2.GenerationFinished) -> None:
        usage = finished.usage
        self._metrics.tenant_tokens(
            lease.tenant.name,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_completion_tokens=usage.num_completion_tokens,
        )
        span = trace.get_current_span()
        reason = types_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()
        span.set_attribute(tracing.GEN_AI_RESPONSE_FINISH_REASONS, [reason])
        span.set_attribute(tracing.GEN_AI_USAGE_INPUT_TOKENS, usage.num_prompt_tokens)
        span.set_attribute(tracing.GEN_AI_USAGE_OUTPUT_TOKENS, usage.num_completion_tokens)

    @asynccontextmanager
    async def _place(self, tenant: Tenant, owner: str, *, instead_of: str = "") -> AsyncIterator[None]:
        """A place in the tenant's quota."""
        await self._sessions.admit(tenant, owner, instead_of=instead_of)
        try:
            yield
        finally:
            await self._sessions.release(tenant, owner)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        started = time.monotonic()
        self.num_streams += 1
        self._idle.clear()
        self._metrics.stream_started()
        code = "OK"
        try:
            yield
        except SpecPoolError as error:
            code = error.status_code_name
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except BaseException:
            code = "INTERNAL"
            raise
        finally:
            self._metrics.stream_ended(code, time.monotonic() - started)
            self.num_streams -= 1
            if self.num_streams == 0:
                self._idle.set()


def _as(kind: Any, event: Event) -> Any:
    """The same event as a message of the public API."""
    name = event.WhichOneof("event")
    assert name is not None
    return kind(**{name: getattr(event, name)})


def _started(request: inference_pb2.GenerateRequest) -> Event:
    return Event(
        started=inference_pb2.GenerationStarted(
            request_id=request.request_id, model=request.model, seed=request.sampling.seed
        )
    )


def _after(delta: inference_pb2.GenerationDelta, num_known: int) -> inference_pb2.GenerationDelta | None:
    """What a client that knows the delta's first ``num_known`` tokens lacks; None if nothing."""
    if num_known <= 0:
        return delta
    if num_known >= len(delta.token_ids) > 0:
        return None
    return inference_pb2.GenerationDelta(
        token_ids=delta.token_ids[num_known:], text=delta.text, logprobs=delta.logprobs[num_known:]
    )


def _annotate(request: inference_pb2.GenerateRequest, tenant: Tenant) -> None:
    span = trace.get_current_span()
    span.set_attribute(tracing.GEN_AI_OPERATION_NAME, "chat" if request.HasField("chat") else "text_completion")
    span.set_attribute(tracing.GEN_AI_PROVIDER_NAME, "specpool")
    span.set_attribute(tracing.GEN_AI_REQUEST_MODEL, request.model)
    span.set_attribute(tracing.GEN_AI_RESPONSE_ID, request.request_id)
    span.set_attribute(tracing.GEN_AI_REQUEST_SEED, request.sampling.seed)
    span.set_attribute(tracing.TENANT, tenant.name)
