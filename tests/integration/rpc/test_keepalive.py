"""Pings keep silent connections alive and never end them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from specpool.rpc.client import channel
from specpool.rpc.server import bind, create_server
from specpool.v1 import target_pb2, target_pb2_grpc

PING_MS = 1_000
SILENCE_S = 5.5
"""Longer than to the fifth ping: after the third, a server that allows fewer ends the connection."""


class _Silent(target_pb2_grpc.TargetServiceServicer):
    """Says something, is silent, and says something again: a queue, a long prefill."""

    async def RunSequence(self, request: Any, context: Any) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        yield target_pb2.RunSequenceResponse()
        await asyncio.sleep(SILENCE_S)
        yield target_pb2.RunSequenceResponse()

    async def GetTargetStatus(self, request: Any, context: Any) -> target_pb2.GetTargetStatusResponse:
        return target_pb2.GetTargetStatusResponse()


async def test_connections_outlive_silence_and_a_ping_every_second() -> None:
    server = create_server()
    target_pb2_grpc.add_TargetServiceServicer_to_server(_Silent(), server)
    endpoint = bind(server, "127.0.0.1:0")
    await server.start()
    async with channel(endpoint, keepalive_ms=PING_MS) as busy, channel(endpoint, keepalive_ms=PING_MS) as idle:
        await target_pb2_grpc.TargetServiceStub(idle).GetTargetStatus(target_pb2.GetTargetStatusRequest())
        lost: list[grpc.ChannelConnectivity] = []
        watch = asyncio.create_task(_note_loss(idle, lost))
        call = target_pb2_grpc.TargetServiceStub(busy).RunSequence(target_pb2.RunSequenceRequest())
        assert len([response async for response in call]) == 2
        watch.cancel()
        assert not lost
    await server.stop(None)


async def _note_loss(connection: grpc.aio.Channel, lost: list[grpc.ChannelConnectivity]) -> None:
    state = connection.get_state()
    assert state is grpc.ChannelConnectivity.READY
    await connection.wait_for_state_change(state)
    lost.append(connection.get_state())
