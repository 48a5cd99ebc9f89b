"""What waits for a target that does not read is bounded."""

from __future__ import annotations

import asyncio

from specpool.v1 import speculator_pb2, types_pb2
from specpool_speculator.connection import Connection

Response = speculator_pb2.SpeculateResponse


async def test_a_target_that_does_not_read_is_not_listened_to_until_it_does() -> None:
    connection = Connection(types_pb2.Peer(id="target"))
    for _ in range(5_000):
        connection.send(Response(load=speculator_pb2.LoadReport()), Response(tables=speculator_pb2.Tables()))
    num_listened = 0
    try:
        while num_listened < 5_000:
            async with asyncio.timeout(0.2):
                await connection.wait_for_room()
            connection.send(Response(resync=speculator_pb2.Resync()))
            num_listened += 1
    except TimeoutError:
        pass
    assert 256 < num_listened < 5_000
    await connection.next_response()
    async with asyncio.timeout(30):
        await connection.wait_for_room()
