"""Who runs in the next forward: continuous batching, chunked prefill, admission and preemption by KV blocks.

A sequence in the batch always has `tokens[kv.length:] + draft` to compute. Between rounds that is its last token and
the draft; after admission or preemption it is the whole prompt (and output), computed in chunks. So prefill, decoding
and recomputation after a preemption are one case: only the chunk that reaches the end asks for logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from specpool.errors import ContextLengthExceeded, TargetUnavailable
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV, num_blocks_for
from specpool_target.engine.prefill_share import PrefillShare, allot
from specpool_target.engine.sequence import TargetSequence


@dataclass(frozen=True, slots=True)
class ScheduledSegment:
    """What one sequence computes in a step."""

    sequence: TargetSequence
    num_tokens: int
    """Number of uncomputed tokens that are computed next, drafts included."""
    is_complete: bool
    """Whether the segment reaches the end of the draft: then the round is verified."""
    is_prefill: bool = False
    """Whether the segment computes more than a round does."""

    def segment(self) -> Segment:
        """The segment that the model computes."""
        sequence = self.sequence
        assert sequence.kv is not None, "only admitted sequences are scheduled"
        start = sequence.kv.length
        tokens = sequence.tokens[start : start + self.num_tokens]
        if not self.is_complete:
            return Segment(kv=sequence.kv, tokens=tokens, num_logits=0)
        draft = sequence.draft.tokens
        return Segment(kv=sequence.kv, tokens=tokens + draft, num_logits=1 + len(draft))


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one step of the engine computes, and who joined or left the batch for it."""

    segments: Sequence[ScheduledSegment]
    admitted: Sequence[TargetSequence]
    """Sequences that are in the batch since this step."""
    preempted: Sequence[TargetSequence]
    """Sequences that are out of the batch since this step."""


class Unschedulable(Exception):
    """Something went wrong with one sequence; the scheduler is as it was, and can go on once that has ended."""

    def __init__(self, sequence: TargetSequence, cause: Exception) -> None:
        super().__init__(str(cause))
        self.sequence = sequence
        self.cause = cause


class Scheduler:
    """Decides who is in the batch; owns the order of the sequences and their KV."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_context: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_prefill_share: float = 0.5,
    ) -> None:
        self.pool = pool
        self._max_context = max_context
        self._max_batch_size = max_batch_size
        self._prefill_share = PrefillShare(max_batch_tokens=max_batch_tokens, max_share=max_prefill_share)
        self._max_waiting = max_waiting
        self.waiting: deque[TargetSequence] = deque()
        self.running: list[TargetSequence] = []
        """Sequences in the batch, the oldest admission first."""
        self._admitted: list[TargetSequence] = []
        """Sequences admitted since the last step that nobody was told of yet."""

    @property
    def max_length(self) -> int:
        """Longest sequence: what the context and the whole KV cache can hold (the last token needs no KV)."""
        return min(self._max_context, self.pool.num_blocks * self.pool.block_size)

    def check_admissible(self, num_tokens: int, num_submitted: int = 0, *, is_continuation: bool = False) -> None:
        """Refuse a prompt that can never run, or that would wait too long. Callable from any thread.

        `num_submitted` sequences are on their way here; those that find a place in the batch will not wait.
        Continuations of streams that another target began have as many places more as a target like this one can lose.
        """
        if num_tokens + 1 > self._max_context:
            raise ContextLengthExceeded(
                f"prompt of {num_tokens} tokens leaves no room for output in the context of {self._max_context} tokens",
                metadata=self._sizes(num_tokens),
            )
        total = self.pool.num_blocks
        wanted = num_blocks_for(num_tokens + 1, self.pool.block_size)
        if wanted > total:
            raise ContextLengthExceeded(
                f"prompt of {num_tokens} tokens needs {wanted} KV blocks of {self.pool.block_size} tokens, "
                f"the cache has {total}",
                metadata=self._sizes(num_tokens),
            )
        num_places = 0 if self.waiting else self._max_batch_size - len(self.running)
        num_waiting = len(self.waiting) + max(0, num_submitted - num_places)
        most = self._max_waiting + (self._max_waiting + self._max_batch_size if is_continuation else 0)
        if num_waiting >= most and self._max_waiting > 0:
            raise TargetUnavailable(
                f"{num_waiting} sequences are waiting already, at most {most} may",
                reason="TARGET_OVERLOADED",
                metadata={"num_waiting": num_waiting, "max_waiting": most},
            )

    def _sizes(self, num_tokens: int) -> dict[str, object]:
        return {"field": "prompt", "value": num_tokens, "accepted": f"at most {self.max_length - 1} tokens"}

    def add(self, sequence: TargetSequence) -> None:
        """Put a sequence into the queue: what has begun, here or elsewhere, goes before what has not."""
        position = len(self.waiting)
        if sequence.has_begun:
            position = next((i for i, other in enumerate(self.waiting) if not other.has_begun), position)
        self.waiting.insert(position, sequence)

    def sequences(self) -> Iterator[TargetSequence]:
        """All sequences, running ones first."""
        yield from self.running
        yield from self.waiting

    def remove(self, sequence: TargetSequence, *, publish: bool = True) -> None:
        """Take out a sequence that has ended and free its KV; with `publish`, full blocks stay findable."""
        if sequence.is_admitted:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.is_admitted = False
        sequence.free(publish=publish)

    def schedule(self) -> ScheduledStep:
        """Segments of the next forward: what is in the batch, oldest first, then admissions; or `Unschedulable`."""
        places = self._places()
        preempted: list[TargetSequence] = []
        for sequence in list(self.running):
            if sequence.is_admitted and sequence.await_deadline_s is None:
                try:
                    self._place_running(sequence, places, preempted)
                except Exception as error:
                    raise Unschedulable(sequence, error) from error
        if not preempted:
            self._admit(places)
        admitted, self._admitted = [s for s in self._admitted if s.is_admitted], []
        return ScheduledStep(places.segments, admitted, preempted)

    def observe(self, step: ScheduledStep, seconds: float) -> None:
        """Take in how long a step's forward took."""
        num_prompt_tokens = sum(one.num_tokens for one in step.segments if one.is_prefill)
        num_round_tokens = sum(one.num_tokens for one in step.segments) - num_prompt_tokens
        self._prefill_share.observe(num_round_tokens, num_prompt_tokens, seconds)

    def _places(self) -> _Places:
        """The step's places, with the tokens that each running prefill gets."""
        ready = [s for s in self.running if s.await_deadline_s is None]
        prefills = [s for s in ready if s.num_uncomputed > 1]
        num_round_tokens = sum(1 + len(s.draft.tokens) for s in ready if s.num_uncomputed == 1)
        budget = self._prefill_share.num_tokens(num_round_tokens)
        given = allot([s.num_uncomputed + len(s.draft.tokens) for s in prefills], budget)
        allotted = {id(sequence): num_tokens for sequence, num_tokens in zip(prefills, given, strict=True)}
        return _Places(self.pool, allotted, prefill_budget=budget - sum(given))

    def _place_running(self, sequence: TargetSequence, places: _Places, preempted: list[TargetSequence]) -> None:
        num_tokens = places.chunk_of(sequence)
        while num_tokens and not places.fits(sequence, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return
        if num_tokens:
            places.add(sequence, num_tokens)

    def _preempt(self, victim: TargetSequence) -> None:
        """Take a sequence out of the batch. Its tokens, round and draft stay; its KV is computed again later."""
        self.running.remove(victim)
        victim.is_admitted = False
        victim.free()
        self.waiting.appendleft(victim)

    def _admit(self, places: _Places) -> None:
        # Blocks that sequences in the batch still need for their prefill are spoken for.
        num_promised = sum(self._blocks_to_finish(s) for s in self.running) - places.num_blocks
        while self.waiting and len(self.running) < self._max_batch_size:
            sequence = self.waiting[0]
            try:
                sequence.kv = SequenceKV.from_prefix(self.pool, sequence.tokens, sequence.salt)
            except Exception as error:
                raise Unschedulable(sequence, error) from error
            wanted = self._blocks_to_finish(sequence)
            if max(0, num_promised) + places.num_blocks + wanted > self.pool.num_free:
                sequence.kv.free()
                sequence.kv = None
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.is_admitted = True
            self._admitted.append(sequence)
            num_promised += wanted
            num_tokens = places.chunk_of(sequence) if sequence.await_deadline_s is None else 0
            if num_tokens:
                num_promised -= places.add(sequence, num_tokens)

    @staticmethod
    def _blocks_to_finish(sequence: TargetSequence) -> int:
        assert sequence.kv is not None, "sequences in the batch have KV"
        return sequence.kv.blocks_to_reserve(sequence.num_uncomputed + len(sequence.draft.tokens))


class _Places:
    """The tokens and blocks that one step has left, while it is being filled."""

    def __init__(self, pool: BlockPool, allotted: Mapping[int, int], *, prefill_budget: int) -> None:
        """`allotted` has the tokens of each running prefill, by the sequence's identity."""
        self._pool = pool
        self._allotted = allotted
        self.prefill_budget = prefill_budget
        """Tokens left for sequences that are admitted now."""
        self.num_blocks = 0
        self.segments: list[ScheduledSegment] = []

    def chunk_of(self, sequence: TargetSequence) -> int:
        """How many tokens `sequence` computes in this step; 0: none."""
        num_draft = len(sequence.draft.tokens)
        if sequence.num_uncomputed == 1:
            return 1 + num_draft
        wanted = sequence.num_uncomputed + num_draft
        budget = self._allotted.get(id(sequence), self.prefill_budget)
        # A draft is verified whole, together with the last token.
        return wanted if wanted <= budget else min(budget, sequence.num_uncomputed - 1)

    def fits(self, sequence: TargetSequence, num_tokens: int) -> bool:
        """Whether enough blocks are left for `num_tokens` tokens of the sequence."""
        assert sequence.kv is not None, "only sequences in the batch are scheduled"
        return self.num_blocks + sequence.kv.blocks_to_reserve(num_tokens) <= self._pool.num_free

    def add(self, sequence: TargetSequence, num_tokens: int) -> int:
        """Schedule `num_tokens` tokens of the sequence; returns the blocks it takes."""
        assert sequence.kv is not None, "only sequences in the batch are scheduled"
        num_blocks = sequence.kv.blocks_to_reserve(num_tokens)
        is_complete = num_tokens == sequence.num_uncomputed + len(sequence.draft.tokens)
        self.segments.append(ScheduledSegment(sequence, num_tokens, is_complete, sequence.num_uncomputed > 1))
        self.num_blocks += num_blocks
        if sequence.num_uncomputed > 1 and id(sequence) not in self._allotted:
            self.prefill_budget -= num_tokens
        return num_blocks
