"""Channel and server options, in one place because both sides' keepalive settings must fit together."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
_KEEPALIVE_MS: Final = 10_000
_KEEPALIVE_TIMEOUT_MS: Final = 5_000

_Options = list[tuple[str, int | str]]


def server_options() -> _Options:
    """Of `create_server`."""
    return [
        *_common_options(),
        # The default (5 minutes) would end connections of clients that ping as ours do.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        # Two servers on one port would share its connections without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


def channel_options(*, use_http_proxy: bool = False) -> _Options:
    """Of `channel`. Calls inside a cluster must not go through a proxy that the environment names."""
    return [
        *_common_options(),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # Peers are few and near: to try each second costs nothing, and hits return a second after a restart.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", int(use_http_proxy)),
    ]


def _common_options() -> _Options:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A peer whose machine is gone is noticed after these two, not after TCP's quarter of an hour.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
