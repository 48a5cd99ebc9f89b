"""A TCP proxy that holds every byte back for a while: a network with latency between two real services."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def delayed(port: int, delay_s: float) -> Iterator[int]:
    """A loopback port that leads to `port`, `delay_s` later in each direction, for as long as the context lasts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    serving = asyncio.run_coroutine_threadsafe(_serve(port, delay_s), loop).result(10)
    try:
        yield int(serving.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _serve(port: int, delay_s: float) -> asyncio.Server:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            return writer.close()  # the service is not there yet: what its clients would see without us
        await asyncio.gather(_pump(reader, far_writer, delay_s), _pump(far_reader, writer, delay_s))
        return None

    return await asyncio.start_server(connect, "127.0.0.1", 0)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Bytes keep their distance in time: each leaves `delay_s` after it came."""
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    clock = asyncio.get_running_loop().time

    async def receive() -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                on_the_way.put_nowait((clock() + delay_s, data))
        on_the_way.put_nowait((clock() + delay_s, b""))

    receiving = asyncio.create_task(receive())
    with suppress(ConnectionError):
        while True:
            due_s, data = await on_the_way.get()
            await asyncio.sleep(due_s - clock())
            if not data:
                break
            writer.write(data)
    writer.close()
    await receiving
