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
    """Who drafts for a sequence, and when."""

    SSD = "ssd"
    """The speculator drafts while the target verifies."""
    SD = "sd"
    """The speculator drafts after each verification."""
    OFF = "off"
    """Nobody drafts."""


class FinishReason(Enum):
    """Why an output ended."""

    STOP = types_pb2.FINISH_REASON_STOP
    LENGTH = types_pb2.FINISH_REASON_LENGTH

    @property
    def label(self) -> str:
        """Name of the reason in metrics and traces."""
        return self.name.lower()


class SequenceState(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """The sequence is not in the batch: not admitted yet, or preempted."""
    PREFILL = "prefill"
    """The sequence is in the batch, with more than one token to compute."""
    RUNNING = "running"
    """The sequence is in the batch and verifies."""
    AWAITING_SPECULATION = "awaiting_speculation"
    """The sequence is in the batch, and waits until a speculation arrives or its deadline passes."""


def draw_seed() -> int:
    """A seed for requests that set none."""
    return secrets.randbits(_SEED_BITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """What the service asks the engine for: one checked request, as plain data."""

    id: str
    """Id of the sequence, unique among the live ones of this target."""
    prompt_tokens: Sequence[int]
    sampling: SamplingParams
    """How tokens are sampled; the seed is set."""
    mode: SpeculationMode = SpeculationMode.SSD
    verification: VerificationMode = VerificationMode.COUPLED
    max_lookahead: int = 8
    """Lookahead K of this request, or the largest K if that is the target's choice."""
    leaves_lookahead: bool = False
    """Whether the request named no K, so that it is the target's choice."""
    committed_tokens: Sequence[int] = ()
    """Output of an earlier target that this sequence continues."""
    was_running: bool = False
    """Whether another target had taken the request, with or without output."""
    stop_token_ids: frozenset[int] = frozenset()
    """End tokens: the request's and, unless ignored, the model's."""
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
    """What the lookup of the outcome before gave: `hit`, `partial`, `late`, `miss` or `none`."""
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
    """Address of the speculator as the directory names it; empty: none."""
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
    """The new pairing, where the sequence has another speculator or none any more; then nothing else is in this
    update."""

    @property
    def is_last(self) -> bool:
        """Whether no update follows this one."""
        return self.finish is not None or self.error is not None


@dataclass(slots=True)
class Draft:
    """The draft tokens that a round verifies, and where they come from."""

    tokens: list[int] = field(default_factory=list)
    source: DraftSource = DraftSource.NONE
    """Where the first tokens come from."""
    lookup: str = "none"
    """What the lookup gave: `hit`, `partial`, `late`, `miss`, or `none` when nothing was looked up."""
    num_tail: int = 0
    """Number of tokens at the end that the backup added to a speculation that was not deep enough."""


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
        """The sequence in the pool; None before it is admitted, and where nobody drafts."""
        self.tokens = [*request.prompt_tokens, *request.committed_tokens]
        self.max_length = min(max_length, len(request.prompt_tokens) + request.sampling.max_tokens)
        self.kv: SequenceKV | None = None
        self.is_admitted = False
        self.was_admitted = False
        """Whether it was in the batch once; stays true when preempted."""
        self.round = 0
        self.draft = Draft()
        self.missed_before: bool | None = None
        """Whether the round that ended last had waited for the speculator after a miss; None if it was a hit."""
        self.lookahead = request.max_lookahead
        """Lookahead K of the next round."""
        self.is_paused = False
        """Whether no speculator is told of the sequence, since plain decoding is faster for now."""
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
        """Output tokens committed so far, an earlier target's included."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def has_begun(self) -> bool:
        """Whether the client waits for the rest: the sequence had a place before, here or at another target."""
        return self.request.was_running or len(self.tokens) > self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Number of tokens without KV, drafts not counted: 1 between rounds, more before the prefill is through."""
        return len(self.tokens) - (self.kv.length if self.kv else 0)

    @property
    def room_for_drafts(self) -> int:
        """Number of draft tokens that the next round could commit and still add its bonus token."""
        return max(0, self.max_length - len(self.tokens) - 1)

    @property
    def state(self) -> SequenceState:
        """Where the sequence is; derived, so that it cannot contradict the rest."""
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
        """Draft tokens by prompt lookup in the sequence's own tokens, see `PromptLookup.propose`."""
        if self._backup_ngram == 0 or num_tokens <= 0:
            return []
        if self._backup is None:
            self._backup = PromptLookup(max_ngram=self._backup_ngram)
        self._backup.extend(self.tokens[self._num_indexed :])
        self._num_indexed = len(self.tokens)
        return self._backup.propose(num_tokens, after=after, min_ngram=min_ngram)

    def verify_item(self, rows: slice, distribution: DraftDistribution | None) -> VerifyItem:
        """What verification needs to know of the sequence, whose logits are `rows` of the step's."""
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
        """Give the KV back; with `publish`, its full blocks stay findable."""
        if self.kv is None:
            return
        kv, self.kv = self.kv, None
        try:
            if publish:
                kv.publish_prefix(self.tokens, self.salt)
        finally:
            kv.free()
