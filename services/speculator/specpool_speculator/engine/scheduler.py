"""Which rows the next draft step runs: one forward for all sequences of all targets.

In this order:
  1. what a target waits for (`speculate_now`);
  2. missing tokens of in-flight paths: context first, in chunks, then the nodes whose ranks give the guesses;
  3. branches, one row each, those most likely to be used first, the rows shared among tenants by weight, and no more
     than are worth the time that they add to the step.
A step takes no more blocks than are free: branches are left out first (width, then depth), then branches of other
sequences are given up, then whole sequences, which are computed again when there is room.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from specpool.algorithm.fan_out import round_to_sum
from specpool.algorithm.row_times import rows_worth_running
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_speculator.engine.room import blocks_for
from specpool_speculator.tree.draft_tree import DraftTree, Work
from specpool_speculator.tree.node import Node
from specpool_speculator.tree.sequence import Branch, SequenceKey, SequenceState

_VALUE = attrgetter("value")
_ONE_BLOCK = 1
"""A row of one token takes a fresh block or the copy of a shared one, never both."""


@dataclass(slots=True)  # not frozen: one is made for every row, and that would take several times as long
class ScheduledWork:
    """Tokens of one sequence in the step."""

    sequence: SequenceState
    """The sequence that the tokens belong to."""
    work: Work
    """The tokens to run, and the blocks for their KV."""
    is_branch: bool
    """Whether this is a branch row, which counts against the row budget and may be left out."""


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What the next forward runs."""

    work: list[ScheduledWork]
    """Work of the forward; empty when there is nothing worth a step."""
    roomless: list[SequenceKey]
    """Sequences whose path could not be scheduled because the others fill the memory."""


class _Step:
    """The step while it is filled: its work, and the blocks that are not spoken for yet."""

    def __init__(self, pool: BlockPool) -> None:
        self.scheduled: list[ScheduledWork] = []
        self.roomless: list[SequenceKey] = []
        self.num_path_tokens = 0
        self._pool = pool
        self._num_blocks = 0
        self._taken: set[int] = set()
        self._nodes: set[int] = set()

    def has_room(self, num_blocks: int) -> bool:
        return self._num_blocks + num_blocks <= self._pool.num_free

    def add_path(self, sequence: SequenceState, limit: int, *, root_only: bool) -> int:
        """Schedule a part of the in-flight path; returns its number of tokens."""
        work = sequence.tree.work_on_path(self._taken, limit, root_only=root_only)
        if work is None:
            return 0
        self._add(sequence, work, blocks_for(len(work.tokens), self._pool), is_branch=False)
        self.num_path_tokens += len(work.tokens)
        return len(work.tokens)

    def add_row(self, sequence: SequenceState, node: Node) -> bool:
        """Schedule a branch tip, unless it is scheduled already or there is no block for it; returns whether it was."""
        if id(node) in self._nodes or not self.has_room(_ONE_BLOCK):
            return False
        self._add(sequence, sequence.tree.work_on(node, self._taken), _ONE_BLOCK, is_branch=True)
        return True

    def _add(self, sequence: SequenceState, work: Work, num_blocks: int, *, is_branch: bool) -> None:
        self._num_blocks += num_blocks
        self._nodes.update(map(id, work.nodes))
        self.scheduled.append(ScheduledWork(sequence, work, is_branch))


def schedule_step(
    sequences: Sequence[SequenceState],
    pool: BlockPool,
    *,
    row_budget: int,
    max_prefill_tokens: int,
    step_s: Callable[[int], float] = lambda num_rows: 0.0,
) -> ScheduledStep:
    """Choose the rows of the next forward.

    `step_s` gives the seconds of a step by its rows, 0 while nothing is measured: of the branches within `row_budget`
    those are left out that would bring less than they delay the others.
    """
    step = _Step(pool)
    try:
        num_rows = _take_asked(step, sequences)
        _take_paths(step, sequences, max_prefill_tokens)
        candidates = [c for sequence in sequences for c in branch_candidates(sequence)]
        if step.scheduled or any(c.is_worth_a_step for c in candidates):
            candidates.sort(key=_VALUE, reverse=True)
            num_branches = rows_worth_running(
                [c.value for c in candidates[: max(row_budget, 0)]],
                step_s,
                num_rows=row_budget - num_rows,
                num_fixed=num_rows + step.num_path_tokens,
            )
            # With one tenant nothing is shared: the best come first already.
            is_shared = len({sequence.options.tenant for sequence in sequences}) > 1
            for candidate in share_rows(candidates, num_branches) if is_shared else candidates[: max(num_branches, 0)]:
                step.add_row(candidate.sequence, candidate.node)
    except Exception:
        cancel(step.scheduled)
        raise
    return ScheduledStep(step.scheduled, step.roomless)


def cancel(scheduled: Iterable[ScheduledWork]) -> None:
    """Give back what was scheduled and will not be run."""
    for one in scheduled:
        one.work.cancel()


def _take_asked(step: _Step, sequences: Iterable[SequenceState]) -> int:
    """Schedule one row for each sequence whose target waits and whose root is computed."""
    num_rows = 0
    for sequence in sequences:
        if sequence.request is None or not sequence.tree.root.is_computed:
            continue
        tokens, tip = sequence.tree.root.chain(sequence.request.num_tokens)
        if len(tokens) < sequence.request.num_tokens and not sequence.is_end(tip):
            num_rows += step.add_row(sequence, tip)
    return num_rows


def _take_paths(step: _Step, sequences: Sequence[SequenceState], max_tokens: int) -> None:
    """Schedule missing tokens of in-flight paths, those that a target waits for first, long ones last."""
    waiting = [s for s in sequences if _misses_path(s)]
    waiting.sort(key=lambda s: (s.request is None, s.tree.missing()))
    scheduled = {scheduled.sequence.key for scheduled in step.scheduled}
    for sequence in waiting:
        limit = min(max_tokens, sequence.tree.missing())
        if limit < 1:
            return
        if step.has_room(blocks_for(limit, step._pool)) or make_room(step, sequence, sequences, limit, scheduled):
            max_tokens -= step.add_path(sequence, limit, root_only=not sequence.options.speculates_ahead)
            scheduled.add(sequence.key)
        else:
            step.roomless.append(sequence.key)


def _misses_path(sequence: SequenceState) -> bool:
    """Whether the in-flight path is to be computed now: ahead of time only the context and in mode SSD."""
    tree, options = sequence.tree, sequence.options
    if options.speculates_ahead:
        return tree.missing() > 0 and tree.path[-1].position < options.max_length
    is_prefill = tree.round == 0 or sequence.request is not None
    return is_prefill and not tree.root.is_computed and tree.root.position < options.max_length


def make_room(
    step: _Step,
    sequence: SequenceState,
    sequences: Sequence[SequenceState],
    num_tokens: int,
    scheduled: set[tuple[int, str]],
) -> bool:
    """Free memory: branches, then whole sequences of less weight or more blocks, until `num_tokens` fit."""
    num_blocks = blocks_for(num_tokens, step._pool)
    others = [s for s in sequences if s is not sequence and s.key not in scheduled]
    trees = [s.tree for s in sorted(others, key=lambda s: (s.options.weight, -s.tree.num_blocks))]
    for tree in [*trees, sequence.tree] if sequence.key not in scheduled else trees:
        tree.prune()
        if step.has_room(num_blocks):
            return True
    for tree in _evictable(trees, sequence):
        tree.evict()
        if step.has_room(num_blocks):
            return True
    return False


def _evictable(trees: Iterable[DraftTree], sequence: SequenceState) -> Iterator[DraftTree]:
    # Only for a sequence that a target waits for: two sequences that do not fit together would otherwise evict one
    # another for ever. One for which there is no room for a while is refused.
    if sequence.request is not None:
        yield from (tree for tree in trees if tree.num_blocks)


def branch_candidates(sequence: SequenceState) -> list[Branch]:
    """The running round's branches that a row would make longer, each with its value."""
    if not sequence.options.speculates_ahead:
        return []
    if sequence.awaits_start:
        return _next_after_draft(sequence)
    return [branch for branch in sequence.branches() if branch.is_open]


def _next_after_draft(sequence: SequenceState) -> list[Branch]:
    """What was just drafted will most likely be verified next: know what follows it early."""
    lookahead = sequence.options.lookahead
    tokens, tip = sequence.tree.root.chain(lookahead + 1)
    if not 0 < len(tokens) <= lookahead or sequence.is_end(tip):
        return []
    assert tip.parent is not None, "the chain has tokens"
    value = sequence.chain_probability(sequence.tree.root, len(tokens))
    return [Branch(sequence, (0, tokens[0]), value, tip.parent, tip.token, False, False, value=value, is_open=True)]


def share_rows(candidates: Iterable[Branch], num_rows: int) -> list[Branch]:
    """At most `num_rows` candidates: each tenant's most valuable ones by its weight, then the best of the rest."""
    of_tenant: dict[str, list[Branch]] = defaultdict(list)
    for candidate in sorted(candidates, key=_VALUE, reverse=True):
        of_tenant[candidate.sequence.options.tenant].append(candidate)
    num_rows = max(num_rows, 0)
    if not of_tenant or sum(map(len, of_tenant.values())) <= num_rows:
        return [c for group in of_tenant.values() for c in group]
    weights = [max(group[0].sequence.options.weight, 1e-6) for group in of_tenant.values()]
    shares = round_to_sum(weights, num_rows)
    chosen = [c for group, share in zip(of_tenant.values(), shares, strict=True) for c in group[:share]]
    rest = [c for group, share in zip(of_tenant.values(), shares, strict=True) for c in group[share:]]
    rest.sort(key=_VALUE, reverse=True)
    return chosen + rest[: num_rows - len(chosen)]
