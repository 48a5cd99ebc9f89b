"""What the router knows of the pods behind it: a channel to each, its last status, whether it can be reached."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpool.discovery.discovery import Discovery, Endpoint, Endpoints
from specpool.discovery.messages import to_messages
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.pod_choice import Candidate

_STATUS_TIMEOUT_S: Final = 2.0
_Status = TypeVar("_Status", target_pb2.GetTargetStatusResponse, speculator_pb2.GetSpeculatorStatusResponse)
_FetchStatus = Callable[[grpc.aio.Channel], Awaitable[_Status]]


@dataclass(slots=True)
class Pod(Generic[_Status]):
    """One target or speculator."""

    endpoint: Endpoint
    channel: grpc.aio.Channel
    status: _Status | None = None
    reachable: bool = False
    healthy: bool = False
    error: str = "not asked yet"
    num_streams: int = 0
    """Streams of this router that run there: newer than any status."""
    task: asyncio.Task[None] | None = None
    polled: asyncio.Event = field(default_factory=asyncio.Event)
    poll_now: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: the next status call does not wait for its time."""

    def candidate(self) -> Candidate:
        """As routing sees it."""
        address = self.endpoint.address
        if self.status is None:
            return Candidate(endpoint=address, model="", tokenizer_fingerprint="", num_sequences=0, available=False)
        load = self.status.load
        return Candidate(
            endpoint=address,
            model=self.status.model.name,
            tokenizer_fingerprint=self.status.model.tokenizer_fingerprint,
            num_sequences=max(self.num_streams, load.num_sequences_running + load.num_sequences_waiting),
            available=self.reachable and self.healthy and self.status.state == types_pb2.SERVING_STATE_SERVING,
            is_leaving=self.endpoint.terminating or not self.endpoint.ready,
        )


class Pods(Generic[_Status]):
    """All pods of one role, polled."""

    def __init__(
        self, role: str, discovery: Discovery, fetch: _FetchStatus[_Status], metrics: RouterMetrics, interval_s: float
    ) -> None:
        self._role = role
        self._discovery = discovery
        self._fetch: _FetchStatus[_Status] = fetch
        self._metrics = metrics
        self._interval_s = interval_s
        self._pods: dict[str, Pod[_Status]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        discovery.on_change(self._on_endpoints)

    async def start(self, first_poll_s: float = _STATUS_TIMEOUT_S) -> None:
        """Begin; gives pods known at once a moment to answer."""
        await self._discovery.start()
        waits = [asyncio.ensure_future(pod.polled.wait()) for pod in self._pods.values()]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=first_poll_s)
            for wait in pending:
                wait.cancel()

    async def close(self) -> None:
        """Stop polling, close channels."""
        await self._discovery.close()
        await asyncio.gather(*(self._close(pod) for pod in self._pods.values()), *self._closing)
        self._pods.clear()

    def all(self) -> list[Pod[_Status]]:
        """Every pod, by address."""
        return [self._pods[address] for address in sorted(self._pods)]

    def candidates(self) -> list[Candidate]:
        """As routing sees them."""
        return [pod.candidate() for pod in self.all()]

    def get(self, address: str) -> Pod[_Status] | None:
        """The pod at an address."""
        return self._pods.get(address)

    def mark_lost(self, pod: Pod[_Status], error: str) -> None:
        """A stream broke: not to be used until it answers a status call again."""
        pod.reachable, pod.error = False, error
        self._notify()

    def poll_soon(self) -> None:
        """Have all of them asked without waiting for the interval."""
        for pod in self._pods.values():
            pod.poll_now.set()

    async def refresh(self) -> None:
        """Ask all of them now."""
        await asyncio.gather(*(self._poll(pod) for pod in self.all()))

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when anything about a pod changed, or after ``timeout_s``."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout_s)

    def _on_endpoints(self, endpoints: Endpoints) -> None:
        now = {endpoint.address: endpoint for endpoint in endpoints}
        for address, pod in list(self._pods.items()):
            endpoint = now.get(address)
            if endpoint is not None and endpoint.is_same(pod.endpoint):
                pod.endpoint = endpoint
            else:
                del self._pods[address]
                closing = asyncio.create_task(self._close(pod))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for endpoint in endpoints:
            if endpoint.address not in self._pods:
                pod = Pod[_Status](endpoint, channel(endpoint.address))
                pod.task = asyncio.create_task(self._poll_forever(pod), name=f"poll {endpoint.address}")
                self._pods[endpoint.address] = pod
        self._notify()

    async def _close(self, pod: Pod[_Status]) -> None:
        if pod.task is not None:
            pod.task.cancel()
            await asyncio.gather(pod.task, return_exceptions=True)
        while pod.num_streams:  # a pod that leaves the list (not ready, draining) may finish what it runs
            await asyncio.sleep(0.1)
        await pod.channel.close()

    async def _poll_forever(self, pod: Pod[_Status]) -> None:
        while True:
            pod.poll_now.clear()
            await self._poll(pod)
            pod.polled.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pod.poll_now.wait(), self._interval_s)

    async def _poll(self, pod: Pod[_Status]) -> None:
        try:
            status, healthy = await asyncio.gather(self._fetch(pod.channel), _is_healthy(pod.channel))
        except grpc.aio.AioRpcError as error:
            pod.reachable, pod.error = False, str(from_rpc_error(error))
        else:
            pod.status, pod.healthy, pod.reachable, pod.error = status, healthy, True, ""
        self._notify()

    def _notify(self) -> None:
        num_reachable = sum(pod.reachable for pod in self._pods.values())
        self._metrics.set_pods(self._role, num_reachable=num_reachable, num_unreachable=len(self._pods) - num_reachable)
        self._changed.set()
        self._changed = asyncio.Event()


class Cluster:
    """Targets and speculators. Every status call tells a target which speculators there are."""

    def __init__(
        self, targets: Discovery, speculators: Discovery, metrics: RouterMetrics, *, poll_interval_s: float = 1.0
    ) -> None:
        self.targets: Pods[target_pb2.GetTargetStatusResponse] = Pods(
            "target", targets, self._target_status, metrics, poll_interval_s
        )
        self.speculators: Pods[speculator_pb2.GetSpeculatorStatusResponse] = Pods(
            "speculator", speculators, _speculator_status, metrics, poll_interval_s
        )
        self.speculator_endpoints: list[types_pb2.SpeculatorEndpoint] = []
        """What targets are told."""
        speculators.on_change(self._on_speculators)

    async def start(self) -> None:
        """Begin to look and to poll."""
        await asyncio.gather(self.targets.start(), self.speculators.start())

    async def close(self) -> None:
        """Stop both."""
        await asyncio.gather(self.targets.close(), self.speculators.close())

    def _on_speculators(self, endpoints: Endpoints) -> None:
        self.speculator_endpoints = to_messages(endpoints)
        self.targets.poll_soon()  # running sequences are to find the newcomers, and leave those that go, at once

    async def _target_status(self, to: grpc.aio.Channel) -> target_pb2.GetTargetStatusResponse:
        stub: Any = target_pb2_grpc.TargetServiceStub(to)
        request = target_pb2.GetTargetStatusRequest(speculators=self.speculator_endpoints)
        status: target_pb2.GetTargetStatusResponse = await stub.GetTargetStatus(request, timeout=_STATUS_TIMEOUT_S)
        return status


async def _speculator_status(to: grpc.aio.Channel) -> speculator_pb2.GetSpeculatorStatusResponse:
    stub: Any = speculator_pb2_grpc.SpeculatorServiceStub(to)
    status: speculator_pb2.GetSpeculatorStatusResponse = await stub.GetSpeculatorStatus(
        speculator_pb2.GetSpeculatorStatusRequest(), timeout=_STATUS_TIMEOUT_S
    )
    return status


async def _is_healthy(to: grpc.aio.Channel) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(to)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_STATUS_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return True
        raise
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
