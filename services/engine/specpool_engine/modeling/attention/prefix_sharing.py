"""Which branches share which leading blocks, so that attention reads these once for all of them.

The tokens of branches that share a prefix attend in two parts: all of them together to the prefix, which every one
sees wholly, and each branch to its own tail. The parts are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from specpool_engine.modeling.attention.interface import PackedSegment
from specpool_engine.modeling.attention.varlen import Entry
from specpool_engine.modeling.paged_kv import num_blocks_for

MIN_KEPT_FRACTION = 0.5
"""Part of its own prefix that a segment must keep in the prefix that all share, to join a group."""


@dataclass(slots=True)
class PrefixGroup:
    """Segments whose block tables begin with the same blocks, all of them full before this forward."""

    prefix: list[int]
    """Blocks that are shared; none in a group of one."""
    segments: list[PackedSegment]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedEntries:
    """Attention in two parts, over tokens put in the order of the groups."""

    order: list[int]
    """Packed token of each place, [T]."""
    prefixes: list[Entry]
    """One entry per group, of all its queries, not causal; without keys in a group of one."""
    tails: list[Entry]
    """One entry per segment: the blocks after the prefix, causal."""

    @property
    def shares(self) -> bool:
        """Whether any prefix is shared."""
        return any(entry.num_keys for entry in self.prefixes)


def whole_entries(segments: Sequence[PackedSegment], block_size: int) -> list[Entry]:
    """The entries of attention in one part: each segment over its own table, causal."""
    return [_tail(segment, 0, block_size) for segment in segments]


def shared_entries(segments: Sequence[PackedSegment], block_size: int) -> SharedEntries:
    """The entries of attention in two parts, the first over shared prefixes."""
    groups = group_by_prefix(segments, block_size)
    ordered = [segment for group in groups for segment in group.segments]
    return SharedEntries(
        order=[token for segment in ordered for token in range(segment.offset, segment.offset + segment.num_tokens)],
        prefixes=[
            Entry(
                num_queries=sum(segment.num_tokens for segment in group.segments),
                blocks=group.prefix,
                num_keys=len(group.prefix) * block_size,
            )
            for group in groups
        ],
        tails=[_tail(segment, len(group.prefix), block_size) for group in groups for segment in group.segments],
    )


def group_by_prefix(segments: Sequence[PackedSegment], block_size: int) -> list[PrefixGroup]:
    """Put segments together that share enough full blocks, each into the first group where it fits."""
    groups_of_root: dict[int, list[PrefixGroup]] = defaultdict(list)
    alone: list[PrefixGroup] = []
    for segment in segments:
        full = segment.kv.block_ids[: segment.kv.length // block_size]
        if not full:
            alone.append(PrefixGroup([], [segment]))
            continue
        groups = groups_of_root[full[0]]
        for group in groups:
            common = _num_common(group.prefix, full)
            if common >= MIN_KEPT_FRACTION * max(len(group.prefix), len(full)):
                del group.prefix[common:]
                group.segments.append(segment)
                break
        else:
            groups.append(PrefixGroup(full, [segment]))
    found = [group for groups in groups_of_root.values() for group in groups] + alone
    for group in found:
        if len(group.segments) == 1:
            group.prefix.clear()
    return found


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _tail(segment: PackedSegment, num_prefix_blocks: int, block_size: int) -> Entry:
    return Entry(
        num_queries=segment.num_tokens,
        blocks=segment.kv.block_ids[num_prefix_blocks : num_blocks_for(segment.end, block_size)],
        num_keys=segment.end - num_prefix_blocks * block_size,
    )
