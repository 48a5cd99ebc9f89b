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
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import unquote

import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from specpool.addresses import format_address, parse_address
from specpool.errors import ConfigError
from specpool.rpc.calls import MAX_RUNNING_CALLS, RunningCalls
from specpool.rpc.interceptors import ErrorInterceptor
from specpool.rpc.options import MAX_MESSAGE_BYTES, server_options
from specpool.rpc.request_parsing import Parsing
from specpool.rpc.tracing import ServerTracing

_logger = logging.getLogger(__name__)
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_CLOSE_S: Final = 1.0
"""Seconds for calls that outlive the drain (health watchers for one), and again for those that outlive being ended."""
_ENDING_S: Final = 3.0
"""Seconds for thousands of calls to end with a reason."""
_ADMISSION_S: Final = 0.1
_QUIET_S: Final = 1.0
_QUIET_SHARE: Final = 0.25
"""Share of the grace for calls that wait to be taken."""
_NEVER_S: Final = 1e6
_TAKEN_IN: Final = 4
"""How many times the size of a legal request gRPC still takes in, so that it can be refused with a reason."""

Drain = Callable[[float], Awaitable[object]]


class Server(grpc.aio.Server):
    """A gRPC server whose calls end with a reason when it stops, and whose stop always ends."""

    def __init__(self, inner: grpc.aio.Server, calls: RunningCalls) -> None:
        self._inner = inner
        self._calls = calls
        self._closing: asyncio.Task[None] | None = None

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """Add handlers as `grpc.aio.Server` does, parsed inside the interceptors; generated code calls it."""
        self._inner.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Any) -> None:
        """Add methods as `grpc.aio.Server` does, parsed inside the interceptors; generated code calls it."""
        self._inner.add_registered_method_handlers(service_name, method_handlers)

    def add_insecure_port(self, address: str) -> int:
        """Listen on an address; returns the port that was bound."""
        return self._inner.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Listen on an address, with TLS; returns the port that was bound."""
        return self._inner.add_secure_port(address, server_credentials)

    async def start(self) -> None:
        """Begin to serve."""
        await self._inner.start()

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Wait until it has stopped; False if it has."""
        return await self._inner.wait_for_termination(timeout)

    async def send_clients_elsewhere(self, timeout_s: float) -> None:
        """Take no new connections, and tell clients (GOAWAY) to make their next calls over a connection to another.

        Running calls go on. Calls that wait to be taken are taken first, which may last ``timeout_s``; when this
        returns they have reached their handlers.
        """
        closing = await self._begin_to_close(timeout_s)
        await asyncio.wait({closing}, timeout=_ADMISSION_S)

    async def _begin_to_close(self, timeout_s: float) -> asyncio.Task[None]:
        if self._closing is None:
            await self._calls.wait_until_quiet(timeout_s)
        if self._closing is None:  # somebody else may have been quicker
            self._closing = asyncio.create_task(self._inner.stop(_NEVER_S))
        return self._closing

    async def stop(self, grace: float | None) -> None:
        """Take nothing new, let running calls go on for ``grace`` seconds, end what is left with `Draining`.

        It may be called again with another grace: the shorter one counts. Returns within a few seconds after the grace,
        whatever handlers do.
        """
        closing = await self._begin_to_close(_QUIET_S if grace is None else min(_QUIET_S, grace))
        await asyncio.wait({closing}, timeout=grace or 0.0)
        if not closing.done():
            self._calls.end("this server stops; the same call may go on at another")
            await asyncio.wait({closing}, timeout=_ENDING_S)
        if not closing.done():
            await asyncio.wait({closing, asyncio.create_task(self._inner.stop(None))}, timeout=_CLOSE_S)
            self._calls.abandon()
            await asyncio.wait({closing}, timeout=_CLOSE_S)
        if not closing.done():
            _logger.error("the server did not close; going on without")


def create_server(
    *interceptors: grpc.aio.ServerInterceptor,
    max_request_bytes: int = MAX_MESSAGE_BYTES,
    larger_requests: Mapping[str, int] = MappingProxyType({}),
    max_calls: int = MAX_RUNNING_CALLS,
) -> Server:
    """A server whose calls are traced and bounded in number and size, and whose errors are typed.

    Args:
        interceptors: run inside of that, and before requests are parsed.
        max_request_bytes: larger requests are refused with a typed error; several times larger ones by gRPC itself,
            which does not take them in.
        larger_requests: the same limit for methods that have one of their own, by path.
        max_calls: more calls than these at once are refused.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_about_metadata)
    calls = RunningCalls(max_calls)
    inner = grpc.aio.server(
        interceptors=(
            ServerTracing(),
            ErrorInterceptor(),
            calls,
            *interceptors,
            Parsing(max_request_bytes, larger_requests),
        ),
        options=server_options(max_message_bytes=min(MAX_MESSAGE_BYTES, _TAKEN_IN * max_request_bytes)),
    )
    return Server(inner, calls)


def _is_not_about_metadata(record: logging.LogRecord) -> bool:
    """False for the records, with traceback, that gRPC logs of strangers' metadata that is no UTF-8."""
    return not str(record.msg).startswith("Invalid encoding")


@dataclass(frozen=True, slots=True)
class Health:
    """Standard health of a server as a whole ("") and of each of its services."""

    services: tuple[str, ...]
    """Full names of the services, without ""."""
    servicer: Any
    """The servicer of `grpc_health.v1`."""

    async def set_serving(self, serving: bool = True) -> None:
        """Tell probes and watchers whether everything serves. Has no effect once the server is stopping."""
        for name in ("", *self.services):
            await self.set_service(name, serving)

    async def set_service(self, name: str, serving: bool) -> None:
        """Tell whether one service serves; "" is the server as a whole."""
        statuses = health_pb2.HealthCheckResponse
        await self.servicer.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    async def stop_serving(self) -> None:
        """Say NOT_SERVING for good."""
        await self.servicer.enter_graceful_shutdown()


def add_standard_services(server: Server, *files: FileDescriptor) -> Health:
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
    server: Server,
    drain: Drain | None = None,
    *,
    health: Health | None = None,
    grace_s: float = 30.0,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``, then stop gracefully, within ``grace_s`` and a few seconds.

    In order: health says NOT_SERVING; calls that wait to be taken are taken; clients are told to connect elsewhere
    (GOAWAY), which refuses nothing: calls that run go on; ``drain`` lets running work end; what still runs after
    ``grace_s`` ends with `Draining`. A second signal ends the wait.

    Args:
        server: started.
        drain: refuses new work and returns when nothing runs any more. It is told how many seconds it has, and may end
            what runs in its own way shortly before. Without it, the work is the running calls.
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
        deadline = time.monotonic() + grace_s
        # Before anything is refused: calls that were taken by then are served like those that run.
        await server.send_clients_elsewhere(_QUIET_SHARE * grace_s)
        left_s = max(deadline - time.monotonic(), 0.0)
        running = server.stop(left_s) if drain is None else drain(left_s)
        await _first_of(running, hurry.wait(), timeout_s=left_s)
        await server.stop(None if hurry.is_set() else _CLOSE_S)
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
    await asyncio.wait(tasks, timeout=_CLOSE_S)
    if not tasks[0].done():
        _logger.error("draining did not end when it was told to; going on without")
    elif not tasks[0].cancelled() and tasks[0].exception() is not None:
        _logger.error("draining failed", exc_info=tasks[0].exception())
