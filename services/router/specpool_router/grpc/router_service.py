"""RouterService: what operators call."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from specpool.errors import PermissionDenied
from specpool.rpc.checks import check_grace
from specpool.v1 import router_pb2, router_pb2_grpc, types_pb2
from specpool_router.auth.tenants import Tenants
from specpool_router.generation.admission import Admission
from specpool_router.placement.cluster import Cluster
from specpool_router.sessions.sessions import Sessions


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """The servicer of `RouterService`: status and drain."""

    def __init__(
        self,
        *,
        peer: types_pb2.Peer,
        cluster: Cluster,
        sessions: Sessions,
        tenants: Tenants,
        admission: Admission,
        stop: asyncio.Event,
    ) -> None:
        self.grace_s = math.inf
        """Seconds that running streams may go on; the settings may say less."""
        self._peer = peer
        self._cluster = cluster
        self._sessions = sessions
        self._tenants = tenants
        self._admission = admission
        self._stop = stop

    async def GetClusterStatus(
        self, request: router_pb2.GetClusterStatusRequest, context: Any
    ) -> router_pb2.GetClusterStatusResponse:
        self._tenants.authenticate(context.invocation_metadata() or ())
        await asyncio.gather(self._cluster.targets.refresh(), self._cluster.speculators.refresh())
        draining = self._admission.is_draining
        return router_pb2.GetClusterStatusResponse(
            router=self._peer,
            state=types_pb2.SERVING_STATE_DRAINING if draining else types_pb2.SERVING_STATE_SERVING,
            targets=[
                router_pb2.TargetEntry(
                    endpoint=pod.endpoint.address, reachable=pod.reachable, error=pod.error, status=pod.status
                )
                for pod in sorted(
                    self._cluster.targets.all(), key=lambda pod: pod.status.target.id if pod.status else ""
                )
            ],
            speculators=[
                router_pb2.SpeculatorEntry(
                    endpoint=pod.endpoint.address, reachable=pod.reachable, error=pod.error, status=pod.status
                )
                for pod in sorted(
                    self._cluster.speculators.all(), key=lambda pod: pod.status.speculator.id if pod.status else ""
                )
            ],
            session_store=self._sessions.store.kind,
            session_store_reachable=self._sessions.reachable,
            num_streams_running=self._admission.num_streams,
        )

    async def DrainRouter(self, request: router_pb2.DrainRouterRequest, context: Any) -> router_pb2.DrainRouterResponse:
        """Stop the process like one that gets SIGTERM, so that clients connect elsewhere at once."""
        tenant = self._tenants.authenticate(context.invocation_metadata() or ())
        if not tenant.operator:
            raise PermissionDenied(f"tenant {tenant.name!r} is no operator; only operators may drain the router")
        check_grace(request.grace_seconds)
        self.grace_s = request.grace_seconds
        self._stop.set()
        return router_pb2.DrainRouterResponse(num_streams_running=self._admission.num_streams)
