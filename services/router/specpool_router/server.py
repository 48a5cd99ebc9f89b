"""The router process. Never imports torch."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable
from functools import partial

from specpool.background import Background
from specpool.discovery import directory
from specpool.discovery.discovery import Discovery, StaticDiscovery
from specpool.rpc.request_parsing import Authentication
from specpool.rpc.server import Health, add_standard_services, bind, create_server, run_until_stopped
from specpool.shutdown import CLOSE_S, close_within
from specpool.telemetry import tracing
from specpool.telemetry.metrics import serve_metrics
from specpool.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc, types_pb2
from specpool_router.auth.tenants import load_tenants
from specpool_router.config import RouterConfig
from specpool_router.generation.admission import Admission
from specpool_router.generation.generations import Generations
from specpool_router.generation.stream import Patience
from specpool_router.grpc.inference_service import InferenceService
from specpool_router.grpc.router_service import RouterService
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import SessionStore
from specpool_router.sessions.sessions import Sessions

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_OPERATIONS = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
_READINESS_INTERVAL_S = 1.0
"""Seconds between two looks at readiness; changes are seen at once."""


async def serve(
    config: RouterConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    metrics: RouterMetrics | None = None,
) -> None:
    """Run a router until SIGTERM, SIGINT or ``stop``. ``on_ready`` gets the real host:port."""
    metrics = metrics or RouterMetrics()
    stop = stop or asyncio.Event()
    tenants = load_tenants(config.tenants_file)
    traces = tracing.setup("specpool-router", config.id, config.otlp_endpoint, config.trace_sampling_ratio)
    sessions = Sessions(make_store(config), metrics)
    cluster = Cluster(*make_discoveries(config), metrics, poll_interval_s=config.poll_interval_s)
    background = Background("router")
    server = None
    try:
        await sessions.start()
        await cluster.start()
        server = create_server(
            Authentication(tenants.authenticate),
            max_request_bytes=config.max_request_bytes,
            # To resume is to send the request again, and what came of it so far.
            larger_requests={f"/{_INFERENCE}/Resume": 2 * config.max_request_bytes},
        )
        endpoint = bind(server, config.listen)
        admission = Admission(sessions, metrics)
        generations = Generations(
            admission=admission, cluster=cluster, sessions=sessions, metrics=metrics, patience=_patience(config)
        )
        inference = InferenceService(generations, cluster=cluster, tenants=tenants)
        health = add_standard_services(server, inference_pb2.DESCRIPTOR, router_pb2.DESCRIPTOR)

        async def drain(grace_s: float) -> None:
            readiness.cancel()
            await admission.drain(min(grace_s, operations.grace_s))

        peer = types_pb2.Peer(id=config.id, incarnation=secrets.randbits(64), endpoint=config.advertise or endpoint)
        operations = RouterService(
            peer=peer,
            cluster=cluster,
            sessions=sessions,
            tenants=tenants,
            admission=admission,
            stop=stop,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        router_pb2_grpc.add_RouterServiceServicer_to_server(operations, server)
        await server.start()
        if config.metrics_port is not None:
            serve_metrics(metrics.registry, config.metrics_port)
        for name in ("", _OPERATIONS):
            await health.set_service(name, True)
        readiness = background.keep_running(
            partial(_report_readiness, health, cluster, config.request_wait_s), name="readiness"
        )
        if on_ready is not None:
            on_ready(endpoint)
        await run_until_stopped(server, drain, health=health, grace_s=config.drain_grace_s, stop=stop)
    finally:
        if server is not None:
            await server.stop(None)
        await background.close()
        await close_within(CLOSE_S, cluster=cluster.close(), sessions=sessions.close(), traces=traces.aclose())


async def _report_readiness(health: Health, cluster: Cluster, hold_s: float) -> None:
    """Show the inference service as healthy while a target can take requests, which is what a readiness probe asks.

    And for ``hold_s`` after that: as long as requests wait, as while the only target is replaced, they should come.
    """
    clock = asyncio.get_running_loop().time
    last_s = -math.inf
    while True:
        is_available = any(target.available for target in cluster.targets.candidates())
        last_s = clock() if is_available else last_s
        await health.set_service(_INFERENCE, is_available or clock() < last_s + hold_s)
        await cluster.targets.wait_for_change(_READINESS_INTERVAL_S)


def _patience(config: RouterConfig) -> Patience:
    return Patience(
        request_wait_s=config.request_wait_s,
        failover_wait_s=config.failover_wait_s,
        progress_timeout_s=config.progress_timeout_s,
    )


def make_store(config: RouterConfig) -> SessionStore:
    """The session store that the settings' URL names."""
    if config.session_store.startswith("memory:"):
        return MemorySessionStore(session_ttl_s=config.session_ttl_s)
    return RedisSessionStore(config.session_store, session_ttl_s=config.session_ttl_s)


def make_discoveries(config: RouterConfig) -> tuple[Discovery, Discovery]:
    """Where targets are found, and where speculators are."""
    namespace = config.kubernetes_namespace
    if not namespace:
        return _listed(config.targets, "targets"), _listed(config.speculators, "speculators")
    return _watched(namespace, config.target_selector), _watched(namespace, config.speculator_selector)


def _listed(entries: tuple[str, ...], field: str) -> Discovery:
    if not entries:
        return StaticDiscovery(())
    is_name = len(entries) == 1 and entries[0].startswith("dns:")
    return directory.parse(entries[0] if is_name else f"static:{','.join(entries)}", field=field)


def _watched(namespace: str, selector: str) -> Discovery:
    return directory.parse(f"kubernetes:{namespace}/{selector}") if selector else StaticDiscovery(())
