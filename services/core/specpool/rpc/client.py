"""Channels to SpecPool services."""

from __future__ import annotations

import grpc.aio

from specpool.addresses import format_address, parse_address
from specpool.rpc.options import channel_options
from specpool.rpc.tracing import ClientStreamTracing, ClientTracing


def channel(endpoint: str, *, use_http_proxy: bool = False) -> grpc.aio.Channel:
    """A channel to ``endpoint`` ("host:port"): keepalive, fast reconnection, trace propagation.

    Use as an asynchronous context manager, or close it.
    """
    return grpc.aio.insecure_channel(
        format_address(*parse_address(endpoint)),
        options=channel_options(use_http_proxy=use_http_proxy),
        interceptors=[ClientTracing(), ClientStreamTracing()],
    )
