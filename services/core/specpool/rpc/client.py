"""Channels to SpecPool services."""

from __future__ import annotations

import grpc.aio

from specpool.addresses import channel_target
from specpool.rpc.options import KEEPALIVE_MS, channel_options
from specpool.rpc.tracing import ClientStreamTracing, ClientTracing


def channel(
    endpoint: str, *, use_http_proxy: bool = False, keepalive_ms: int = KEEPALIVE_MS, own_connection: bool = False
) -> grpc.aio.Channel:
    """A channel to ``endpoint``: keepalive, fast reconnection, trace propagation.

    Use as an asynchronous context manager, or close it.

    Args:
        endpoint: "host:port"; or several IP addresses with their ports, separated by commas, of which one is used as
            long as it answers.
        use_http_proxy: whether a proxy that the environment names is used.
        keepalive_ms: interval of pings, also while nothing runs.
        own_connection: whether it connects for itself, perhaps to another server behind the same name; the channels
            of a process share their connections otherwise.
    """
    return grpc.aio.insecure_channel(
        channel_target(endpoint),
        options=channel_options(
            use_http_proxy=use_http_proxy, keepalive_ms=keepalive_ms, own_connection=own_connection
        ),
        interceptors=[ClientTracing(), ClientStreamTracing()],
    )
