"""The whole SSD round, in one function, over interfaces that a test can fake.

This is the reference: every engine and every fast path must give what it gives. The lines marked
"meanwhile" happen at the same time on different hardware; here they are written one after the other,
because nothing in them depends on the other's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specpool.algorithm.draft_distribution import DraftDistribution
from specpool.algorithm.speculation_cache import Lookup, LookupKind, Outcome, SpeculationCache
from specpool.algorithm.verification import VerificationMode, VerificationOutcome, verify


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft tokens that the target verifies in a round, and the distributions that they were sampled from."""

    tokens: tuple[int, ...] = ()
    """Draft tokens that the target verifies; may be empty."""
    distribution: DraftDistribution | None = None
    """The draft's distributions; None unless rejection needs them, or when they did not arrive in time."""


class Target(Protocol):
    """The large model, as the round sees it."""

    def score(self, committed: Sequence[int], draft_tokens: Sequence[int]) -> Tensor:
        """Processed logits [K + 1, V] after ``committed + draft_tokens[:j]``, j = 0..K."""
        ...


class Speculator(Protocol):
    """The draft model, as the round sees it."""

    def speculate(self, committed: Sequence[int]) -> Draft:
        """Draft the tokens after ``committed``."""
        ...

    def predict(self, committed: Sequence[int], in_flight: Draft) -> Mapping[Outcome, Sequence[int]]:
        """Guess outcomes of verifying ``in_flight`` and draft after each."""
        ...

    def distribution(self, committed: Sequence[int], tokens: Sequence[int]) -> DraftDistribution | None:
        """The distributions that ``tokens``, drafted after ``committed``, were sampled from; None if not needed."""
        ...


@dataclass(frozen=True, slots=True)
class RoundState:
    """State of one sequence between two rounds."""

    committed: tuple[int, ...]
    """Tokens of prompt and output so far."""
    speculation: Draft = Draft()
    """The draft that the next round verifies."""
    round: int = 0
    """Number of the next round."""


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one round leaves."""

    state: RoundState
    """State that the next round begins with."""
    outcome: VerificationOutcome
    """Outcome of this round's verification."""
    lookup: Lookup
    """What the cache had for that outcome."""


def speculative_round(
    state: RoundState,
    target: Target,
    speculator: Speculator,
    cache: SpeculationCache,
    *,
    mode: VerificationMode,
    seed: int = 0,
    fallback: Callable[[Sequence[int]], Draft] = lambda committed: Draft(),
) -> RoundResult:
    """Verify what is in flight; meanwhile prepare for its outcome; take the next speculation from the cache.

    Args:
        state: of the sequence.
        target: verifies.
        speculator: guesses.
        cache: of this sequence.
        mode: of the request.
        seed: of the request.
        fallback: what to verify next when the cache has nothing: a backup, or ``speculator.speculate``.
    """
    committed, in_flight = state.committed, state.speculation

    # meanwhile, on the speculator: guess (accepted length, bonus token) and draft for each guess
    cache.update(state.round, speculator.predict(committed, in_flight))

    # meanwhile, on the target: one forward over all drafted tokens
    scores = target.score(committed, in_flight.tokens)
    outcome = verify(
        mode,
        scores,
        in_flight.tokens,
        seed=seed,
        position=len(committed),
        draft=in_flight.distribution,
    )

    committed = (*committed, *outcome.committed(in_flight.tokens))
    lookup = cache.lookup(state.round, outcome.num_accepted, outcome.bonus_token)
    if lookup.kind in (LookupKind.HIT, LookupKind.PARTIAL):
        following = Draft(lookup.tokens, speculator.distribution(committed, lookup.tokens))
    else:
        following = fallback(committed)
    return RoundResult(RoundState(committed, following, state.round + 1), outcome, lookup)
