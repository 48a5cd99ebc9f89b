"""Everything a SpecPool server has in common: options, interceptors, health, reflection, graceful stop.

Typical use::

    server = create_server()
    target_pb2_grpc.add_TargetServiceServicer_to_server(service, server)
    health = add_standard_services(server, target_pb2.DESCRIPTOR)
    endpoint = bind(server, config.listen)
    await server.start()
    await health.set_serving()
    await run_until_stopped(server, engine.drain, health=health, grace_s=config.drain_grace_s)
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from specpool.addresses import format_address, parse_address
from specpool.errors import ConfigError
from specpool.rpc.interceptors import ErrorInterceptor
from specpool.rpc.options import server_options
from specpool.rpc.tracing import ServerTracing

_logger = logging.getLogger(__name__)
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_CLOSE_S: Final = 1.0  # for calls that outlive the drain, health watchers for one


def create_server(*interceptors: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    """A server whose calls are traced and whose errors are typed; ``interceptors`` run inside both."""
    return grpc.aio.server(interceptors=(ServerTracing(), ErrorInterceptor(), *interceptors), options=server_options())


@dataclass(frozen=True, slots=True)
class Health:
    """Standard health of a server as a whole ("") and of each of its services."""

    services: tuple[str, ...]
    """Full names, without ""."""
    servicer: Any
    """Of grpc_health.v1."""

    async def set_serving(self, serving: bool = True) -> None:
        """Tell probes and watchers. Has no effect once the server is stopping."""
        for name in ("", *self.services):
            await self.set_service(name, serving)

    async def set_service(self, name: str, serving: bool) -> None:
        """One service; "" is the server as a whole."""
        statuses = health_pb2.HealthCheckResponse
        await self.servicer.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    async def stop_serving(self) -> None:
        """NOT_SERVING for good."""
        await self.servicer.enter_graceful_shutdown()


def add_standard_services(server: grpc.aio.Server, *files: FileDescriptor) -> Health:
    """Add health and reflection for every service in ``files``. NOT_SERVING until `Health.set_serving`."""
    names = tuple(service.full_name for file in files for service in file.services_by_name.values())
    health = Health(names, grpc_health.aio.HealthServicer())
    for name in ("", *names):
        health.servicer._server_status[name] = health_pb2.HealthCheckResponse.NOT_SERVING
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    standard = (grpc_health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection((*names, *standard), server)
    return health


def bind(server: grpc.aio.Server, listen: str) -> str:
    """Bind to ``listen`` ("host:port", port 0: any free one) and return the address with the real port."""
    host, port = parse_address(listen)
    try:
        bound_port = server.add_insecure_port(format_address(host, port))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {listen}: {error}", metadata={"field": "listen", "value": listen}
        ) from error
    return format_address(host, bound_port)


def host_of_peer(peer: str) -> str:
    """The address in what gRPC says of a peer ("ipv4:10.0.0.1:5005", "ipv6:%5B::1%5D:5005")."""
    try:
        return parse_address(unquote(peer.partition(":")[2]))[0]
    except ConfigError:
        return ""


async def run_until_stopped(
    server: grpc.aio.Server,
    drain: Callable[[], Awaitable[object]] | None = None,
    *,
    health: Health | None = None,
    grace_s: float = 30.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``, then stop gracefully.

    In order: health says NOT_SERVING; ``drain`` gets up to ``grace_s`` to let running work end; what still runs is
    cancelled. Without ``drain``, running calls get ``grace_s``. A second signal ends the wait.

    Args:
        server: started.
        drain: refuses new work and returns when nothing runs any more.
        health: of this server.
        grace_s: longest wait for running work.
        stop: another way to be stopped (a failed engine, a test).
    """
    stopping = stop or asyncio.Event()
    hurry = asyncio.Event()
    with _stop_signals(stopping, hurry):
        await stopping.wait()
        _logger.info("stopping (up to %g s for running work)", grace_s)
        if health is not None:
            await health.stop_serving()
        if drain is not None:
            await _first_of(drain(), hurry.wait(), timeout_s=grace_s)
        grace_left_s = _CLOSE_S if drain is not None else grace_s
        stopped = asyncio.ensure_future(server.stop(grace_left_s))
        await _first_of(asyncio.shield(stopped), hurry.wait(), timeout_s=None)
        if not stopped.done():
            await server.stop(None)
            await stopped
    _logger.info("stopped")


@contextmanager
def _stop_signals(stopping: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stopping.is_set() else stopping).set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


async def _first_of(work: Awaitable[object], interrupt: Awaitable[object], *, timeout_s: float | None) -> None:
    """Wait for either; cancel what is left. A failure of ``work`` is logged: stopping goes on."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(interrupt)]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception):
        _logger.error("draining failed", exc_info=results[0])
