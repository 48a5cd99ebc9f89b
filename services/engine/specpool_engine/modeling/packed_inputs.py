"""Tokens of many sequences as one row: what a forward over them is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from specpool_engine.modeling.attention import PackedSegment
from specpool_engine.modeling.interface import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedInputs:
    """What a forward is computed from, besides block tables; one value per packed token."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Position of each token in its sequence."""
    slots: list[int] = field(default_factory=list)
    """Slot of each token's keys and values in the flattened cache."""
    logit_rows: list[int] = field(default_factory=list)
    """Indices of the packed tokens whose logits are wanted."""

    @classmethod
    def of(cls, segments: Sequence[Segment], packed: Sequence[PackedSegment], block_size: int) -> PackedInputs:
        """The inputs of a forward over segments whose block tables have room for their tokens."""
        return cls(
            tokens=[token for segment in segments for token in segment.tokens],
            positions=[position for segment in packed for position in range(segment.kv.length, segment.end)],
            slots=_slots(packed, block_size),
            logit_rows=_logit_rows(segments, packed),
        )


class SmallForwards(Protocol):
    """Another way to compute forwards that are small enough, see `cuda_graphs`."""

    def run(self, segments: Sequence[PackedSegment], inputs: PackedInputs) -> Tensor | None:
        """The logits [rows, V]; None for a forward that is too large."""
        ...


def pack(segments: Sequence[Segment]) -> list[PackedSegment]:
    """The places of the segments in the row."""
    packed, offset = [], 0
    for segment in segments:
        packed.append(PackedSegment(kv=segment.kv, offset=offset, num_tokens=len(segment.tokens)))
        offset += len(segment.tokens)
    return packed


def _slots(packed: Sequence[PackedSegment], block_size: int) -> list[int]:
    """Slot of every packed token in the flattened cache."""
    return [
        segment.kv.block_ids[position // block_size] * block_size + position % block_size
        for segment in packed
        for position in range(segment.kv.length, segment.end)
    ]


def _logit_rows(segments: Sequence[Segment], packed: Sequence[PackedSegment]) -> list[int]:
    return [
        row
        for segment, place in zip(segments, packed, strict=True)
        for row in range(place.offset + place.num_tokens - segment.num_logits, place.offset + place.num_tokens)
    ]
