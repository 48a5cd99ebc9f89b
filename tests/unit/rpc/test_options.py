"""Options that gRPC does not know are ignored by it without a word, so they are looked up in the library itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from specpool.rpc.options import channel_options, server_options


@pytest.fixture(scope="module")
def library() -> bytes:
    """The compiled library, in which every key that it looks up is a string that ends with a zero."""
    return Path(cygrpc.__file__).read_bytes()


def is_known(key: str, library: bytes) -> bool:
    return key.encode() + b"\0" in library


@pytest.mark.parametrize("key", sorted({key for key, _ in server_options() + channel_options()}))
def test_grpc_knows_every_option(key: str, library: bytes) -> None:
    assert is_known(key, library)


def test_the_check_tells_keys_from_similar_words(library: bytes) -> None:
    assert not is_known("grpc.http2.min_recv_ping_interval_without_data_ms", library)
    assert not is_known("grpc.keepalive_time", library)
