"""Channel and server options, in one place because both sides' keepalive settings must fit together.

gRPC ignores a key that it does not know without a word: a test compares every key here with those in the library.
"""

from __future__ import annotations

import json
from typing import Final

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Largest message between services in bytes: a client's request, the tokens committed so far, and room to spare."""
KEEPALIVE_MS: Final = 10_000
_KEEPALIVE_TIMEOUT_MS: Final = 5_000
_PING_TIMEOUT_MS: Final = 15_000
"""Longer than the other: only a ping's own answer ends this one, which on a slow line comes behind what was sent."""
_SHORTEST_PING_INTERVAL_MS: Final = 500
_MAX_WAITING_CALLS: Final = 100_000
_LONGEST_WAIT_S: Final = 600

# A server that stops ends a call with a bare CANCELLED if it was sent before the client heard of the stop (GOAWAY). It
# did not begin: gRPC sends it again, on a new connection.
_RETRIES: Final = {
    "maxAttempts": 5,
    "initialBackoff": "0.02s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["CANCELLED"],
}

_Options = list[tuple[str, int | str]]


def server_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> _Options:
    """Options of a server that takes messages of up to ``max_message_bytes``."""
    return [
        *_common_options(max_message_bytes),
        # Less than any sensible client's interval: one that pings too often has its connection ended, and with it
        # every stream on it. The default is five minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", _SHORTEST_PING_INTERVAL_MS),
        # Calls that the event loop has not taken yet. Beyond these limits gRPC ends calls with a bare CANCELLED, so
        # they are far above the number of calls that a server runs at once, beyond which it refuses with a reason.
        ("grpc.server.max_pending_requests", _MAX_WAITING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_WAITING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", _LONGEST_WAIT_S),
        # Two servers on one port would share its connections without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


def channel_options(
    *, use_http_proxy: bool = False, keepalive_ms: int = KEEPALIVE_MS, own_connection: bool = False
) -> _Options:
    """Options of a channel. Calls inside a cluster must not go through a proxy that the environment names."""
    return [
        *_common_options(MAX_MESSAGE_BYTES, keepalive_ms),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # Peers are few and near: to try each second costs nothing, and hits return a second after a restart.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", int(use_http_proxy)),
        ("grpc.use_local_subchannel_pool", int(own_connection)),
        ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": _RETRIES}]})),
    ]


def _common_options(max_receive_bytes: int, keepalive_ms: int = KEEPALIVE_MS) -> _Options:
    return [
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A peer whose machine is gone is noticed after these two, not after TCP's quarter of an hour.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # Only one ping at a time is on its way. On a busy connection it may be one by which gRPC measures bandwidth:
        # keepalive waits for its end, for a minute by default.
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
