"""The ends of a pool: whoever made one may close it, whatever became of it before."""

from __future__ import annotations

import time

import numpy as np
import pytest

from specpool.discovery.discovery import StaticDiscovery
from specpool.errors import InvalidArgument
from specpool.speculation import PoolIdentity, SpeculationPool
from specpool.v1 import types_pb2


def make_pool() -> SpeculationPool:
    identity = PoolIdentity(peer=types_pb2.Peer(id="engine"), model=types_pb2.ModelInfo(vocab_size=31))
    return SpeculationPool(StaticDiscovery(()), identity)


def test_a_pool_that_was_never_started_is_closed_at_once() -> None:
    started_s = time.monotonic()
    make_pool().close()
    assert time.monotonic() - started_s < 5


def test_a_pool_may_be_closed_twice() -> None:
    pool = make_pool()
    pool.start()
    pool.close()
    pool.close()
    assert pool.open([1], types_pb2.SamplingParams()).next(0, 2).kind is None


def test_a_sequence_may_be_opened_with_an_array() -> None:
    pool = make_pool()
    pool.start()
    assert pool.open(np.array([1, 2]), types_pb2.SamplingParams()).num_tokens == 2
    with pytest.raises(InvalidArgument):
        pool.open(np.array([], dtype=int), types_pb2.SamplingParams())
    pool.close()
