"""What the router knows of the pods of one role: a channel to each, its last status, whether it is alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Generic, TypeVar

import grpc
import grpc.aio

from specpool.background import Background
from specpool.discovery.discovery import Discovery, Endpoint, Endpoints
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import speculator_pb2, target_pb2, types_pb2
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.pod_choice import Candidate

_logger = logging.getLogger(__name__)
STATUS_TIMEOUT_S: Final = 2.0
_CLOSE_S: Final = 3.0
_MAX_MISSED: Final = 3
"""Status answers in a row that may be late before a pod is lost: a busy or stopped process is not a dead one."""
_FLOW_S: Final = 5.0
"""Seconds after a stream brought something in which its pod is alive, whatever became of its status."""
_STUCK_S: Final = 10.0
"""Seconds at one thing after which an engine is stuck: its pod is used where there is no other."""
_REMEMBERED_S: Final = 600.0
"""Seconds for which a model is expected back after its last target went."""
Status = TypeVar("Status", target_pb2.GetTargetStatusResponse, speculator_pb2.GetSpeculatorStatusResponse)
Fetch = Callable[[grpc.aio.Channel], Awaitable[tuple[Status, bool]]]
"""Asks a pod for its status, and for whether the standard health service says SERVING."""
SignOfLife = Callable[[Status | None, Status], float]
"""Seconds since a pod got on for sure, by its last status but one and its last; infinite if they do not tell."""


@dataclass(slots=True)
class Pod(Generic[Status]):
    """One target or speculator, as this router knows it."""

    endpoint: Endpoint
    channel: grpc.aio.Channel
    status: Status | None = None
    reachable: bool = False
    healthy: bool = False
    error: str = "not asked yet"
    num_missed: int = 0
    """Number of status answers in a row that did not come in time."""
    num_streams: int = 0
    """Number of streams of this router that run there: newer than any status."""
    heard_s: float = -math.inf
    """Time at which a stream last brought something, by the event loop's clock."""
    progressed_s: float = -math.inf
    """Time at which its status last showed that it gets on, by the event loop's clock."""
    is_stuck: bool = False
    """Whether its status shows that it has not got on for a while."""
    task: asyncio.Task[None] | None = None
    is_leaving: bool = False
    """Whether the pod is no longer to be polled."""
    polled: asyncio.Event = field(default_factory=asyncio.Event)
    poll_now: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to have the next status call made without waiting for its time."""

    def candidate(self) -> Candidate:
        """The pod as the choice of a target sees it."""
        address = self.endpoint.address
        if self.status is None:
            return Candidate(endpoint=address, model="", num_sequences=0, available=False)
        load = self.status.load
        is_alive = self.reachable or time.monotonic() - self.heard_s < _FLOW_S
        return Candidate(
            endpoint=address,
            model=self.status.model.name,
            num_sequences=max(self.num_streams, load.num_sequences_running + load.num_sequences_waiting),
            available=is_alive and self.healthy and self.status.state == types_pb2.SERVING_STATE_SERVING,
            is_leaving=self.endpoint.terminating or not self.endpoint.ready,
            is_late=self.num_missed > 0 or self.is_stuck,
        )

    def lose(self, error: str) -> None:
        """Use the pod no more until it answers or a stream brings something."""
        self.reachable, self.heard_s, self.error = False, -math.inf, error


class Pods(Generic[Status]):
    """All pods of one role, polled."""

    def __init__(
        self,
        role: str,
        discovery: Discovery,
        fetch: Fetch[Status],
        metrics: RouterMetrics,
        interval_s: float,
        *,
        sign_of_life: SignOfLife[Status] = lambda _, __: math.inf,
    ) -> None:
        self._role = role
        self._discovery = discovery
        self._fetch: Fetch[Status] = fetch
        self._sign_of_life: SignOfLife[Status] = sign_of_life
        self._metrics = metrics
        self._interval_s = interval_s
        self._pods: dict[str, Pod[Status]] = {}
        self._served_s: dict[str, float] = {}
        self._background = Background(f"{role}s")
        self._leaving: dict[asyncio.Task[None], Pod[Status]] = {}
        self._changed = asyncio.Event()
        discovery.on_change(self._on_endpoints)

    async def start(self, first_poll_s: float = STATUS_TIMEOUT_S) -> None:
        """Begin to poll, and give pods known at once a moment to answer."""
        await self._discovery.start()
        waits = [asyncio.ensure_future(pod.polled.wait()) for pod in self._pods.values()]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=first_poll_s)
            for wait in pending:
                wait.cancel()

    async def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Stop polling, close channels; what still runs after ``timeout_s`` loses its channel."""
        await self._discovery.close()
        pods = [*self._pods.values(), *self._leaving.values()]
        closing = [*self._leaving, *map(self._start_closing, self._pods.values())]
        self._pods.clear()
        if closing:
            await asyncio.wait(closing, timeout=timeout_s)
        for task in closing:
            task.cancel()
        for pod in pods:
            await pod.channel.close()

    def all(self) -> list[Pod[Status]]:
        """Every pod, by address."""
        return [self._pods[address] for address in sorted(self._pods)]

    def candidates(self) -> list[Candidate]:
        """All pods as the choice of a target sees them."""
        return [pod.candidate() for pod in self.all()]

    def get(self, address: str) -> Pod[Status] | None:
        """The pod at an address."""
        return self._pods.get(address)

    def served_lately(self, model: str) -> bool:
        """Whether a pod had this model a while ago, so that one is expected back."""
        return time.monotonic() - self._served_s.get(model, -math.inf) < _REMEMBERED_S

    def mark_lost(self, pod: Pod[Status], error: str) -> None:
        """Note that a stream broke: its pod is not used until it shows a sign of life."""
        pod.lose(error)
        self._notify()

    async def refresh(self) -> None:
        """Ask all pods now; what becomes of one that leaves meanwhile is no matter."""
        await asyncio.gather(*(self._poll(pod) for pod in self.all()), return_exceptions=True)

    def poll_soon(self) -> None:
        """Have all pods asked without waiting for the interval."""
        for pod in self._pods.values():
            pod.poll_now.set()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when anything about a pod changed, or after ``timeout_s``."""
        await _wait(self._changed, timeout_s)

    def _on_endpoints(self, endpoints: Endpoints) -> None:
        now = {endpoint.address: endpoint for endpoint in endpoints}
        for address, pod in list(self._pods.items()):
            endpoint = now.get(address)
            if endpoint is not None and endpoint.is_same(pod.endpoint):
                pod.endpoint = endpoint
            else:
                del self._pods[address]
                closing = self._start_closing(pod)
                self._leaving[closing] = pod
                closing.add_done_callback(self._leaving.pop)
        for endpoint in endpoints:
            if endpoint.address not in self._pods:
                pod = Pod[Status](endpoint, channel(endpoint.address))
                poll = partial(self._poll_forever, pod)
                pod.task = self._background.keep_running(poll, name=f"poll of {endpoint.address}")
                self._pods[endpoint.address] = pod
        self._notify()

    def _start_closing(self, pod: Pod[Status]) -> asyncio.Task[None]:
        return self._background.run(self._close(pod), name=f"closing of {pod.endpoint.address}")

    async def _close(self, pod: Pod[Status]) -> None:
        pod.is_leaving = True
        if pod.task is not None:
            pod.task.cancel()
            await asyncio.wait({pod.task}, timeout=STATUS_TIMEOUT_S)
        while pod.num_streams:  # a pod that leaves the list may finish what it runs
            await asyncio.sleep(0.1)
        await pod.channel.close()

    async def _poll_forever(self, pod: Pod[Status]) -> None:
        while not pod.is_leaving:  # a call that fails while it is being cancelled hides the cancellation
            pod.poll_now.clear()
            try:
                answered = await self._poll(pod)
            except Exception:  # a defect must not leave the pod as it was last seen for ever
                _logger.exception("asking %s for its status failed", pod.endpoint.address)
                answered = False
            pod.num_missed = 0 if answered else pod.num_missed + 1
            if pod.num_missed >= _MAX_MISSED and pod.reachable:
                pod.reachable = False
                self._notify()
            pod.polled.set()
            await _wait(pod.poll_now, self._interval_s)

    async def _poll(self, pod: Pod[Status]) -> bool:
        """Ask a pod for its status; returns whether it answered."""
        before = pod.candidate(), pod.reachable
        try:
            status, healthy = await self._fetch(pod.channel)
        except grpc.aio.AioRpcError as error:
            pod.error = str(from_rpc_error(error))
            # Nobody is there, or somebody who says that it is broken. Anything else may be mere lateness.
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL):
                pod.reachable = False
            answered = False
        else:
            now_s = time.monotonic()
            silent_s = self._sign_of_life(pod.status, status)
            pod.progressed_s = max(pod.progressed_s, now_s - silent_s)
            pod.is_stuck = _STUCK_S < silent_s < math.inf
            pod.status, pod.healthy, pod.reachable, pod.error = status, healthy, True, ""
            self._served_s[status.model.name] = now_s
            answered = True
        if before != (pod.candidate(), pod.reachable):
            self._notify()
        return answered

    def _notify(self) -> None:
        num_reachable = sum(pod.reachable for pod in self._pods.values())
        self._metrics.set_pods(self._role, num_reachable=num_reachable, num_unreachable=len(self._pods) - num_reachable)
        self._changed.set()
        self._changed = asyncio.Event()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)
