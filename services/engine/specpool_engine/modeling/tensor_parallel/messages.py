"""What rank 0 and its followers tell each other.

In this order: rank 0 sends a `ShardSetup`; the follower answers `Imported` when it is ready to join the process group,
and after loading how many blocks its KV cache could have; rank 0 answers with the number that all ranks get; the
follower says `Ready`. From then on rank 0 sends one step per forward, as bytes, until it closes the connection. A
follower that cannot go on sends a `Failure` in place of whatever was next, and ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.kv_budget import KVBudget
from specpool_engine.modeling.model import Copies
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV, num_blocks_for
from specpool_engine.modeling.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSetup:
    """Everything a rank needs to load its part."""

    spec: ModelSpec
    directory: str
    """Folder of the model, downloaded and converted."""
    rank: int
    size: int
    store_port: int
    """Port of the store on this machine where the ranks meet."""
    dtype: torch.dtype
    device: torch.device
    backend: str
    """Name of the attention backend."""
    budget: KVBudget
    """Size of this rank's KV cache."""
    timeout_s: float
    """Longest that joining, and every exchange between the ranks, may take."""


class Imported:
    """Message of a follower whose libraries are loaded."""


class Ready:
    """Message of a follower that waits for steps."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Message of a follower that ends: the reason."""

    reason: str
    """Reason of a `SpecPoolError`; empty for any other error."""
    message: str


def encode_step(segments: Sequence[Segment], copies: Copies) -> bytes:
    """A forward over segments that have room, as bytes, with the copies that come before it."""
    sources, destinations = copies
    numbers = array("q", (len(sources), *sources, *destinations))
    for segment in segments:
        kv, num_tokens = segment.kv, len(segment.tokens)
        blocks = kv.block_ids[: num_blocks_for(kv.length + num_tokens, kv.pool.block_size)]
        numbers.extend((kv.length, segment.num_logits, num_tokens, len(blocks)))
        numbers.extend(segment.tokens)
        numbers.extend(blocks)
    return numbers.tobytes()


def decode_step(message: bytes, pool: BlockPool) -> tuple[list[Segment], Copies]:
    """What `encode_step` was given. The tables own nothing in `pool`, which only gives the size of a block."""
    numbers = array("q")
    numbers.frombytes(message)
    num_copies = numbers[0]
    start = 1 + 2 * num_copies
    copies = numbers[1 : 1 + num_copies].tolist(), numbers[1 + num_copies : start].tolist()
    segments = []
    while start < len(numbers):
        length, num_logits, num_tokens, num_blocks = numbers[start : start + 4]
        blocks_at = start + 4 + num_tokens
        kv = SequenceKV(pool)
        kv.length = length
        kv.block_ids = numbers[blocks_at : blocks_at + num_blocks].tolist()
        tokens = numbers[start + 4 : blocks_at].tolist()
        segments.append(Segment(kv=kv, tokens=tokens, num_logits=num_logits))
        start = blocks_at + num_blocks
    return segments, copies
