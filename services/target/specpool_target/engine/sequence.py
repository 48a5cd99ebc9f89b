"""One sequence at the target: its tokens, its KV, what it verifies next, and what it tells its stream."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from specpool.algorithm.draft_distribution import DraftDistribution
from specpool.algorithm.prompt_lookup import PromptLookup
from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode
from specpool.errors import SpecPoolError
from specpool.speculation import DraftSource, SequenceHandle
from specpool.v1 import types_pb2
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_target.engine.statistics import Phases, SequenceStats
from specpool_target.verify.verify_step import TokenLogprobs, VerifyItem

_SEED_BITS: Final = 63


class SpeculationMode(StrEnum):
    """Who drafts, and when."""

    SSD = "ssd"
    """The speculator, while the target verifies."""
    SD = "sd"
    """The speculator, after each verification."""
    OFF = "off"
    """Nobody drafts."""


class FinishReason(Enum):
    """Why an output ended."""

    STOP = types_pb2.FINISH_REASON_STOP
    LENGTH = types_pb2.FINISH_REASON_LENGTH

    @property
    def label(self) -> str:
        """Its name in metrics and traces."""
        return self.name.lower()


class SequenceState(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """Not in the batch: not admitted yet, or preempted."""
    PREFILL = "prefill"
    """In the batch, with more than one token to compute."""
    RUNNING = "running"
    """In the batch, verifying."""
    AWAITING_SPECULATION = "awaiting_speculation"
    """In the batch, until a speculation arrives or the deadline passes."""


def draw_seed() -> int:
    """A seed for requests that set none."""
    return secrets.randbits(_SEED_BITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """What the service asks the engine for; checked already."""

    id: str
    """Unique among the live sequences of this target."""
    prompt_tokens: Sequence[int]
    sampling: SamplingParams
    """How it is sampled; the seed is set."""
    mode: SpeculationMode = SpeculationMode.SSD
    verification: VerificationMode = VerificationMode.COUPLED
    max_lookahead: int = 8
    """K of this request, or the largest K if it is the target's choice."""
    leaves_lookahead: bool = False
    """The request named no K: it is the target's choice."""
    committed_tokens: Sequence[int] = ()
    """Output of an earlier target that this one continues."""
    was_running: bool = False
    """Whether another target had taken it, with or without output."""
    stop_token_ids: frozenset[int] = frozenset()
    """The request's and, unless ignored, the model's end tokens."""
    tenant: str = ""
    tenant_weight: float = 1.0
    cache_salt: bytes = b""
    traceparent: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundInfo:
    """One verification, as traces show it."""

    num_draft_tokens: int
    num_accepted: int
    lookup: str
    """What the lookup of the outcome before gave: where this round's tokens come from."""
    phases: Phases


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """The end of a sequence: why, and what it took."""

    reason: FinishReason
    stats: types_pb2.GenerationStats
    num_cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Pairing:
    """The speculator that a sequence is paired with."""

    address: str = ""
    """Address as the directory names it; empty: none."""
    speculator_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceUpdate:
    """What a step did for one sequence."""

    tokens: Sequence[int] = ()
    text: str | None = None
    """Text that became final; None: the receiver detokenizes (no stop strings)."""
    logprobs: Sequence[TokenLogprobs] = ()
    round: RoundInfo | None = None
    finish: Finish | None = None
    error: SpecPoolError | None = None
    """Why the sequence failed; then nothing follows."""
    paired: Pairing | None = None
    """It has another speculator, or none any more; nothing else is in this update."""

    @property
    def is_last(self) -> bool:
        """Whether no update follows this one."""
        return self.finish is not None or self.error is not None


@dataclass(slots=True)
class Draft:
    """Tokens that a round verifies, and where they come from."""

    tokens: list[int] = field(default_factory=list)
    source: DraftSource = DraftSource.NONE
    """Where the first tokens come from."""
    lookup: str = "none"
    """hit, partial, late, miss, or none when nothing was looked up."""
    num_tail: int = 0
    """The last tokens that the backup added to a speculation that was not deep enough."""


class TargetSequence:
    """State of one sequence. Only the engine thread touches it."""

    def __init__(
        self,
        request: SequenceRequest,
        *,
        detokenizer: IncrementalDetokenizer | None = None,
        max_length: int,
        backup_ngram: int = 3,
        arrived_s: float = 0.0,
    ) -> None:
        self.request = request
        self.detokenizer = detokenizer
        self.handle: SequenceHandle | None = None
        """In the pool; None before it is admitted, and where nobody drafts."""
        self.tokens = [*request.prompt_tokens, *request.committed_tokens]
        self.max_length = min(max_length, len(request.prompt_tokens) + request.sampling.max_tokens)
        self.kv: SequenceKV | None = None
        self.is_admitted = False
        self.was_admitted = False
        """Stays true when preempted."""
        self.round = 0
        self.draft = Draft()
        self.missed_before: bool | None = None
        """Whether the round that ended last had waited for the speculator after a miss; None if it was a hit."""
        self.lookahead = request.max_lookahead
        """Draft tokens of the next round (K)."""
        self.is_paused = False
        """Whether no speculator is told of it, since plain decoding is faster for now."""
        self.await_deadline_s: float | None = None
        self.stats = SequenceStats()
        self.num_cached_prompt_tokens = 0
        self.arrived_s = arrived_s
        self.first_token_s: float | None = None
        self.round_ended_s = arrived_s
        self.await_started_s = 0.0
        self.waited_s = 0.0
        self._backup_ngram = backup_ngram
        self._backup: PromptLookup | None = None
        self._num_indexed = 0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def seed(self) -> int:
        """Seed of the sequence's noise."""
        seed = self.request.sampling.seed
        assert seed is not None, "the service draws a seed"
        return seed

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens, output not counted."""
        return len(self.request.prompt_tokens)

    @property
    def output_tokens(self) -> list[int]:
        """Committed so far, an earlier target's included."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def has_begun(self) -> bool:
        """Whether its client waits for the rest: it had a place before, here or at another target."""
        return self.request.was_running or len(self.tokens) > self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is missing, drafts not counted: 1 between rounds, more before the prefill is through."""
        return len(self.tokens) - (self.kv.length if self.kv else 0)

    @property
    def room_for_drafts(self) -> int:
        """Draft tokens that the next round could commit and still add its bonus token."""
        return max(0, self.max_length - len(self.tokens) - 1)

    @property
    def state(self) -> SequenceState:
        """Derived, so that it cannot contradict the rest."""
        if not self.is_admitted:
            return SequenceState.WAITING
        if self.await_deadline_s is not None:
            return SequenceState.AWAITING_SPECULATION
        return SequenceState.PREFILL if self.num_uncomputed > 1 else SequenceState.RUNNING

    @property
    def salt(self) -> str:
        """Salt of the tenant's prefix cache."""
        return self.request.cache_salt.hex()

    def backup(self, num_tokens: int, *, after: Sequence[int] = (), min_ngram: int = 1) -> list[int]:
        """Prompt lookup in the sequence's own tokens, see `PromptLookup.propose`."""
        if self._backup_ngram == 0 or num_tokens <= 0:
            return []
        if self._backup is None:
            self._backup = PromptLookup(max_ngram=self._backup_ngram)
        self._backup.extend(self.tokens[self._num_indexed :])
        self._num_indexed = len(self.tokens)
        return self._backup.propose(num_tokens, after=after, min_ngram=min_ngram)

    def verify_item(self, rows: slice, distribution: DraftDistribution | None) -> VerifyItem:
        """What verification needs to know of it; `rows` of the step's logits are its."""
        params = self.request.sampling
        has_penalties = params.has_penalties
        return VerifyItem(
            rows=rows,
            draft_tokens=self.draft.tokens,
            params=params,
            mode=self.request.verification,
            seed=self.seed,
            position=len(self.tokens),
            distribution=distribution,
            prompt_tokens=self.request.prompt_tokens if has_penalties else (),
            output_tokens=self.output_tokens if has_penalties else (),
        )

    def free(self, *, publish: bool = True) -> None:
        """Give the KV back; with `publish` its full blocks stay findable."""
        if self.kv is None:
            return
        kv, self.kv = self.kv, None
        try:
            if publish:
                kv.publish_prefix(self.tokens, self.salt)
        finally:
            kv.free()
