"""The gRPC service: streams of targets, status, drain."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc.aio

from specpool.background import Background
from specpool.errors import Draining, ProtocolMismatch
from specpool.rpc.checks import check_grace
from specpool.rpc.server import host_of_peer
from specpool.speculation.handshake import acknowledge, check_hello
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.distributions.transport import Transport, choose, offered
from specpool_engine.modeling.load_model import parse_device
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.connection import Connection
from specpool_speculator.dense.sending_group import Channel, SendingGroup
from specpool_speculator.engine import checks
from specpool_speculator.engine.engine import SpeculatorEngine
from specpool_speculator.metrics import SpeculatorMetrics

_logger = logging.getLogger(__name__)
_LOAD_PERIOD_S: Final = 1.0
_HELLO_S: Final = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculatorIdentity:
    """What peers learn about this process in handshake and status."""

    peer: types_pb2.Peer
    """Id, incarnation and endpoint of this process."""
    model: types_pb2.ModelInfo
    """Name and fingerprint of the draft model."""
    num_tokens: int
    """Number of tokens that the tokenizer knows."""


class SpeculatorService(speculator_pb2_grpc.SpeculatorServiceServicer):
    """Connects target streams to the engine."""

    def __init__(
        self,
        engine: SpeculatorEngine,
        identity: SpeculatorIdentity,
        config: SpeculatorConfig,
        metrics: SpeculatorMetrics,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._transports = offered(config.distribution_transport, config.device)
        self._groups: dict[int, SendingGroup] = {}
        self._loop = asyncio.get_running_loop()
        self._identity = identity
        self._config = config
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count(1)
        self._is_draining = False
        self._no_streams = asyncio.Event()
        self._no_streams.set()

    # ---- calls ----------------------------------------------------------------------------------------------

    async def Speculate(
        self,
        request_iterator: AsyncIterator[speculator_pb2.SpeculateRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[speculator_pb2.SpeculateResponse]:
        """One target's stream; see the service comment in the proto file."""
        if self._is_draining:
            raise Draining(f"speculator {self._identity.peer.id!r} is draining")
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await anext(aiter(request_iterator), None)
        except TimeoutError:
            raise ProtocolMismatch(f"no hello within {_HELLO_S:g} s") from None
        if first is None:
            return
        transport = self._greet(first)
        number, connection = next(self._numbers), Connection(first.hello.target)
        yield acknowledge(
            first.hello,
            peer=self._identity.peer,
            own=self._identity.model,
            transport=transport.value,
            max_lookahead=self._config.max_lookahead,
            row_budget=self._config.row_budget,
            max_sequences=self._config.max_sequences,
            load=self._load(),
        )
        self._open(number, connection, first.hello.model.vocab_size)
        self._groups[number] = self._group(number, connection, transport, host_of_peer(context.peer()))
        reader = asyncio.create_task(self._read(number, connection, request_iterator))
        report = partial(self._report_load, connection)
        reporter = Background(f"stream of {first.hello.target.id}").keep_running(report, name="load reports")
        try:
            while (response := await connection.next_response()) is not None:
                yield response
            await reader  # raises what ended the stream
        finally:
            self._close(number)
            for task in (reader, reporter):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def GetSpeculatorStatus(
        self, request: speculator_pb2.GetSpeculatorStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> speculator_pb2.GetSpeculatorStatusResponse:
        """Report what this speculator is and does now."""
        snapshot = self._engine.snapshot
        return speculator_pb2.GetSpeculatorStatusResponse(
            speculator=self._identity.peer,
            state=types_pb2.SERVING_STATE_DRAINING if self._is_draining else types_pb2.SERVING_STATE_SERVING,
            model=self._identity.model,
            load=self._load(),
            row_budget=self._config.row_budget,
            max_lookahead=self._config.max_lookahead,
            targets=[connection.target for connection in self._connections.values()],
            acceptance_rate=snapshot.acceptance_rate,
            miss_power_law=snapshot.miss_power_law,
            confidence_spread=snapshot.confidence_spread,
            fan_out_policy=self._config.fan_out_policy,
            plan=snapshot.explanation,
            num_steps=self._engine.thread.heartbeat.num_steps,
            seconds_in_step=self._engine.thread.heartbeat.age_s,
            max_sequences=self._config.max_sequences,
            refusals=[
                speculator_pb2.RefusalCount(reason=reason, num_sequences=num_sequences)
                for reason, num_sequences in sorted(snapshot.refusals.items())
            ],
        )

    async def DrainSpeculator(
        self, request: speculator_pb2.DrainSpeculatorRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> speculator_pb2.DrainSpeculatorResponse:
        """Ask every target to move its sequences; refuse new streams. Waits for the streams to end."""
        check_grace(request.grace_seconds)
        self.start_draining("drain was asked for")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._no_streams.wait(), request.grace_seconds)
        return speculator_pb2.DrainSpeculatorResponse(num_sequences_running=self._engine.snapshot.num_sequences)

    # ---- draining -------------------------------------------------------------------------------------------

    def start_draining(self, reason: str) -> None:
        """Send go_away on every stream."""
        if self._is_draining:
            return
        self._is_draining = True
        for connection in self._connections.values():
            connection.send(_go_away(reason))

    async def drain(self, grace_s: float) -> None:
        """Start draining and wait until every target has ended its stream; the server ends what is left."""
        self.start_draining("shutting down")
        await self._no_streams.wait()

    # ---- streams --------------------------------------------------------------------------------------------

    def _greet(self, first: speculator_pb2.SpeculateRequest) -> Transport:
        """Check the first message of a stream; returns the transport to use."""
        if first.WhichOneof("message") != "hello":
            raise ProtocolMismatch(f"the first message must be hello, got {first.WhichOneof('message')}")
        checks.check_hello(first.hello)
        check_hello(first.hello, self._identity.model, self._identity.num_tokens)
        return choose(first.hello.transports, self._transports)

    def _open(self, number: int, connection: Connection, vocab_size: int) -> None:
        self._connections[number] = connection
        self._no_streams.clear()
        self._engine.connect(number, vocab_size, connection)
        if self._is_draining:  # it began while this target was greeted
            connection.send(_go_away("the speculator is draining"))
        _logger.info("target %s connected", connection.target.id)

    def _group(self, number: int, connection: Connection, transport: Transport, peer_host: str) -> SendingGroup:
        def on_up(channel: Channel) -> None:
            self._engine.set_channel(number, channel)
            self._show_transports()

        def on_down(channel: Channel) -> None:
            self._engine.drop_channel(number, channel)
            self._show_transports()

        return SendingGroup(
            transport,
            peer_host=peer_host,
            device=parse_device(self._config.device),
            deliver=connection.deliver,
            on_up=on_up,
            on_down=on_down,
            on_sent=self._metrics.dense_distributions,
        )

    def _show_transports(self) -> None:
        """Set the metric of transports in use; callable from any thread."""
        with suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._set_transports)

    def _set_transports(self) -> None:
        used = {group.transport if group.is_up else Transport.GRPC for group in self._groups.values()}
        self._metrics.set_transports([transport.label for transport in used or {Transport.GRPC}])

    def _close(self, number: int) -> None:
        if (group := self._groups.pop(number, None)) is not None:
            group.close()
        self._engine.disconnect(number)
        connection = self._connections.pop(number)
        if not self._connections:
            self._no_streams.set()
        _logger.info("target %s disconnected", connection.target.id)

    async def _read(
        self, number: int, connection: Connection, requests: AsyncIterator[speculator_pb2.SpeculateRequest]
    ) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind in (None, "hello"):
                    raise ProtocolMismatch(f"unexpected message after the acknowledgement: {kind}")
                checks.check_ids(request)
                if kind == "open_group":
                    self._groups[number].open(request.open_group.group)
                elif kind == "group_key":
                    self._groups[number].receive_key(request.group_key)
                else:
                    await connection.wait_for_room()
                    self._engine.submit(number, request)
        finally:
            connection.close()

    async def _report_load(self, connection: Connection) -> None:
        while True:
            report = speculator_pb2.LoadReport(load=self._load())
            connection.send(speculator_pb2.SpeculateResponse(load=report))
            await asyncio.sleep(_LOAD_PERIOD_S)

    def _load(self) -> types_pb2.Load:
        snapshot = self._engine.snapshot
        return types_pb2.Load(
            num_sequences_running=snapshot.num_sequences,
            num_kv_blocks=snapshot.num_kv_blocks,
            num_free_kv_blocks=snapshot.num_free_kv_blocks,
            rows_per_step=snapshot.rows_per_step,
            step_ms=snapshot.step_ms,
            num_prefix_cache_queried_tokens=snapshot.num_prefix_queried_tokens,
            num_prefix_cache_hit_tokens=snapshot.num_prefix_hit_tokens,
        )


def _go_away(reason: str) -> speculator_pb2.SpeculateResponse:
    return speculator_pb2.SpeculateResponse(go_away=speculator_pb2.GoAway(reason=reason))
