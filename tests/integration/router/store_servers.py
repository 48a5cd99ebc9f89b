"""Real servers with options of their own, and a proxy that spoils what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError

_START_S = 30.0


@asynccontextmanager
async def redis_server(binary: str | Path, folder: Path, *options: str, password: str = "") -> AsyncIterator[str]:
    """A server on a Unix socket; gives the socket's path."""
    socket = folder / "server.sock"
    process = await asyncio.create_subprocess_exec(
        *(str(binary), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder), *options),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _answers(socket, password):
                await asyncio.sleep(0.02)
        yield str(socket)
    finally:
        process.kill()
        await process.wait()


async def _answers(socket: Path, password: str) -> bool:
    client = redis.Redis(unix_socket_path=str(socket), password=password or None)
    try:
        await client.info()
    except RedisConnectionError:
        return False
    finally:
        await client.aclose()
    return True


class Proxy:
    """Between a store and its server. Everything is passed on, later and, when told, without its answer."""

    def __init__(self, server: str, socket: Path, *, delay_s: float = 0.0) -> None:
        self.num_round_trips = 0
        self.num_connections = 0
        self._server = server
        self._socket = socket
        self._delay_s = delay_s
        self._num_drops = 0
        self.dropped = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def drop_answers(self, number: int = 1) -> None:
        """The server executes what comes next; its answer is lost, and the connection with it."""
        self._num_drops = number
        self.dropped.clear()

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_unix_server(self._accept, str(self._socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(self._server)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, to_writer))
                group.create_task(self._answer(to_reader, writer))
        except* (ConnectionError, EOFError):
            pass
        finally:
            for end in (writer, to_writer):
                end.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            self.num_round_trips += 1
            await asyncio.sleep(self._delay_s)
            writer.write(data)
        raise EOFError

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            if self._num_drops:
                self._num_drops -= 1
                self.dropped.set()
                break
            writer.write(data)
        raise EOFError
