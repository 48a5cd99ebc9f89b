"""InferenceService: what clients call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from specpool.request_limits import MAX_REQUEST_ID_CHARS, check_text
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from specpool_router.auth.tenants import Tenants
from specpool_router.generation.generations import Generations
from specpool_router.generation.resume_point import ResumePoint
from specpool_router.generation.target_run import Event
from specpool_router.placement.cluster import Cluster


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The servicer of `InferenceService`: authenticates, and translates."""

    def __init__(self, generations: Generations, *, cluster: Cluster, tenants: Tenants) -> None:
        self._generations = generations
        self._cluster = cluster
        self._tenants = tenants

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        async with aclosing(self._generations.generate(tenant, request)) as events:
            async for event in events:
                yield _as(inference_pb2.GenerateResponse, event)

    async def Resume(
        self, request: inference_pb2.ResumeRequest, context: Any
    ) -> AsyncGenerator[inference_pb2.ResumeResponse, None]:
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        async with aclosing(self._generations.resume(tenant, resume_point(request))) as events:
            async for event in events:
                yield _as(inference_pb2.ResumeResponse, event)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Any) -> inference_pb2.CancelResponse:
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        check_text("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
        return inference_pb2.CancelResponse(cancelled=await self._generations.cancel(tenant, request.request_id))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        self._tenants.authenticate(context.invocation_metadata() or ())
        models: dict[str, types_pb2.ModelInfo] = {}
        for pod in self._cluster.targets.all():
            if pod.reachable and pod.status is not None:
                models.setdefault(pod.status.model.name, pod.status.model)
        return inference_pb2.ListModelsResponse(models=[models[name] for name in sorted(models)])


def resume_point(request: inference_pb2.ResumeRequest) -> ResumePoint:
    """The point that a client resumes at: what it asks for, and what it says that it has. Raises InvalidArgument."""
    check_text("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
    token_ids = tuple(request.received_token_ids)
    return ResumePoint(
        request_id=request.request_id,
        num_tokens=request.num_tokens_received or len(token_ids),
        num_chars=request.num_chars_received if request.HasField("num_chars_received") else None,
        token_ids=token_ids if token_ids or request.num_tokens_received == 0 else None,
        request=request.request if request.HasField("request") else None,
    )


def _as(kind: Any, event: Event) -> Any:
    """The same event as a message of the public API."""
    name = event.WhichOneof("event")
    assert name is not None
    return kind(**{name: getattr(event, name)})
