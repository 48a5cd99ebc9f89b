"""Targets and speculators behind the router, and how each is asked how it is."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpool.discovery.discovery import Discovery, Endpoints
from specpool.discovery.messages import to_messages
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.pods import STATUS_TIMEOUT_S, Pods


class Cluster:
    """The targets and speculators that there are. Every status call tells a target of the speculators."""

    def __init__(
        self, targets: Discovery, speculators: Discovery, metrics: RouterMetrics, *, poll_interval_s: float = 1.0
    ) -> None:
        self.speculator_endpoints: list[types_pb2.SpeculatorEndpoint] = []
        """Speculators as targets are told of them."""
        self.targets: Pods[target_pb2.GetTargetStatusResponse] = Pods(
            "target", targets, self._target_status, metrics, poll_interval_s, sign_of_life=_target_life_s
        )
        self.speculators: Pods[speculator_pb2.GetSpeculatorStatusResponse] = Pods(
            "speculator", speculators, _speculator_status, metrics, poll_interval_s
        )
        speculators.on_change(self._on_speculators)

    async def start(self) -> None:
        """Begin to look for pods and to poll them."""
        await asyncio.gather(self.speculators.start(), self.targets.start())

    async def close(self) -> None:
        """Stop looking and polling."""
        await asyncio.gather(self.targets.close(), self.speculators.close())

    def _on_speculators(self, endpoints: Endpoints) -> None:
        self.speculator_endpoints = to_messages(endpoints)
        self.targets.poll_soon()  # running sequences are to find the newcomers, and leave those that go, at once

    async def _target_status(self, to: grpc.aio.Channel) -> tuple[target_pb2.GetTargetStatusResponse, bool]:
        stub: Any = target_pb2_grpc.TargetServiceStub(to)
        request = target_pb2.GetTargetStatusRequest(speculators=self.speculator_endpoints)
        status, healthy = await asyncio.gather(stub.GetTargetStatus(request, timeout=STATUS_TIMEOUT_S), _is_healthy(to))
        return status, healthy


def _target_life_s(
    before: target_pb2.GetTargetStatusResponse | None, status: target_pb2.GetTargetStatusResponse
) -> float:
    """Seconds since the engine last got on for sure. One without work gives no sign: a stream there should not."""
    if before is None or status.num_steps != before.num_steps:
        return 0.0
    return status.seconds_in_step or math.inf


async def _speculator_status(to: grpc.aio.Channel) -> tuple[speculator_pb2.GetSpeculatorStatusResponse, bool]:
    stub: Any = speculator_pb2_grpc.SpeculatorServiceStub(to)
    request = speculator_pb2.GetSpeculatorStatusRequest()
    status, healthy = await asyncio.gather(stub.GetSpeculatorStatus(request, timeout=STATUS_TIMEOUT_S), _is_healthy(to))
    return status, healthy


async def _is_healthy(to: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(to)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=STATUS_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return True
        raise
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
