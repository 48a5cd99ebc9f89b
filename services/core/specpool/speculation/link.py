"""Keeps one speculator connected: hello, serve until the stream is lost, again after a pause."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

import grpc.aio

from specpool.background import Background
from specpool.backoff import Backoff
from specpool.errors import (
    ProtocolMismatch,
    SpecPoolError,
    SpeculatorUnavailable,
    TokenizerMismatch,
    TransportUnavailable,
)
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.speculation.connection import Connection, ConnectionListener, error_of
from specpool.speculation.dense import DenseReceiver
from specpool.speculation.handshake import check_ack
from specpool.v1 import speculator_pb2, speculator_pb2_grpc

_logger = logging.getLogger(__name__)

_REFUSED_PAUSE_S: Final = 15.0
"""Seconds of pause after a handshake that will be refused again until somebody deploys something else."""
_HANDSHAKE_S: Final = 5.0
_CLOSE_S: Final = 1.0
_REFUSALS: Final = (TokenizerMismatch, ProtocolMismatch, TransportUnavailable)

Request = speculator_pb2.SpeculateRequest


class LinkListener(ConnectionListener, Protocol):
    """The pool, as a link sees it; called from the event loop."""

    def connected(self, link: SpeculatorLink, connection: Connection) -> None:
        """Note that a handshake succeeded."""

    def disconnected(self, link: SpeculatorLink, connection: Connection) -> None:
        """Note that a connection has ended."""

    def attempt_failed(self, link: SpeculatorLink) -> None:
        """Note that there is no connection; `last_error` says why. It is tried again."""


class SpeculatorLink:
    """The link to one address. Belongs to the event loop; attributes may be read from any thread."""

    def __init__(
        self,
        address: str,
        *,
        hello: Callable[[], speculator_pb2.Hello],
        listener: LinkListener,
        receiver: DenseReceiver | None = None,
    ) -> None:
        self.address = address
        self.connection: Connection | None = None
        """The live connection, if there is one."""
        self.has_failed = False
        """Whether the last attempt, or connection, ended and none has succeeded since."""
        self.last_error = ""
        self.created_at_s = time.monotonic()
        self._is_closing = False
        self._hello = hello
        self._listener = listener
        self._receiver = receiver
        self._task = Background(f"speculator {address}").keep_running(self._run, name="link")

    async def close(self) -> None:
        """End the connection cleanly for the speculator's side, too, and stop connecting."""
        self._is_closing = True
        if self.connection is not None:
            self.connection.half_close()
        try:
            if self.connection is not None:
                await asyncio.wait([self._task], timeout=_CLOSE_S)
        finally:  # also if whoever waits for this is cancelled
            self._task.cancel()
        await asyncio.wait([self._task], timeout=_CLOSE_S)

    async def _run(self) -> None:
        # A second at most: hits return soon after a speculator has.
        backoff = Backoff(first_s=0.1, longest_s=1.0)
        async with channel(self.address) as to:
            stub = speculator_pb2_grpc.SpeculatorServiceStub(to)
            while True:
                started_s = time.monotonic()
                error = await self._attempt(stub)
                if self._is_closing:
                    return
                if time.monotonic() - started_s > _HANDSHAKE_S:
                    backoff.reset()
                self._note(error)
                self._listener.attempt_failed(self)
                await asyncio.sleep(_REFUSED_PAUSE_S if isinstance(error, _REFUSALS) else backoff.next_s())

    def _note(self, error: SpecPoolError) -> None:
        if error.message != self.last_error:
            _logger.warning("speculator %s: %s", self.address, error.message)
        self.last_error, self.has_failed = error.message, True

    async def _attempt(self, stub: Any) -> SpecPoolError:
        """Make one connection, and keep it from handshake to loss; returns why it ended."""
        call = stub.Speculate()
        try:
            await self._serve(await asyncio.wait_for(self._connect(call), _HANDSHAKE_S))
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, unavailable=SpeculatorUnavailable)
        except SpecPoolError as error:
            return error
        except TimeoutError:
            return SpeculatorUnavailable(f"no answer to hello within {_HANDSHAKE_S:g} s")
        finally:
            call.cancel()
        return SpeculatorUnavailable("the speculator ended the stream")

    async def _connect(self, call: Any) -> Connection:
        await call.wait_for_connection()
        started_s = time.perf_counter()
        hello = self._hello()
        await call.write(Request(hello=hello))
        response = await call.read()
        if response is grpc.aio.EOF:
            # The status has the reason; reading it raises.
            if await call.code() is not grpc.StatusCode.OK:
                raise await error_of(call)
            raise ProtocolMismatch("the speculator ended the stream instead of answering hello")
        if response.WhichOneof("message") != "hello_ack":
            raise ProtocolMismatch(f"hello was answered with {response.WhichOneof('message')}")
        check_ack(hello, response.hello_ack)
        return Connection(
            self.address,
            call,
            response.hello_ack,
            round_trip_s=time.perf_counter() - started_s,
            listener=self._listener,
            receiver=self._receiver,
        )

    async def _serve(self, connection: Connection) -> None:
        self.connection, self.last_error, self.has_failed = connection, "", False
        _logger.info("speculator %s connected (%s)", self.address, connection.ack.speculator.id)
        self._listener.connected(self, connection)
        try:
            with suppress(asyncio.InvalidStateError):
                await connection.serve()
        finally:
            connection.is_open = False
            self.connection, self.has_failed = None, True
            self._listener.disconnected(self, connection)
