"""What outcomes taught about guessing: how many guesses to make, and how likely each is to be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specpool.algorithm.calibration import RankCalibration
from specpool.algorithm.estimators import AcceptanceEstimator, MissPowerLawEstimator
from specpool.algorithm.fan_out import (
    DEFAULT_MISS_AFTER_ACCEPTANCE,
    PowerLaw,
    geometric_fan_out,
    outcome_probabilities,
    uniform_fan_out,
)
from specpool_speculator.config import FanOutPolicy
from specpool_speculator.tree.node import Node

_REFIT_EVERY = 16
"""Outcomes between two fits: a fit costs more than a round can spare, and estimates move slowly."""


@dataclass(frozen=True, slots=True)
class GuessSpread:
    """How one round's outcome is guessed, for a lookahead of d tokens."""

    fan_out: tuple[int, ...]
    """Number of guesses for each accepted length 0 .. d; empty with a `budget`."""
    probabilities: tuple[tuple[float, ...], ...]
    """[d + 1][fan_out[k]]: how likely guess i after k accepted tokens is the outcome."""
    acceptance: float
    """Probability that the next drafted token is accepted, given those before it were."""
    budget: int = 0
    """Number of guesses in all, made where the draft's own probabilities are highest; 0: by `fan_out` instead."""


@dataclass(slots=True)
class Estimates:
    """Online estimates for the sequences of one verification mode."""

    policy: FanOutPolicy
    """How guesses are spread over accepted lengths."""
    budget: int
    """Number of guesses per sequence and round (B)."""
    has_probabilities: bool = True
    """Whether ranks have probabilities of their own, so that `best_first` can go by them."""
    calibration: RankCalibration = field(default_factory=RankCalibration)
    """How scores of the draft's ranks become probabilities."""
    _acceptance: AcceptanceEstimator = field(default_factory=AcceptanceEstimator)
    _after_rejection: MissPowerLawEstimator = field(default_factory=MissPowerLawEstimator)
    _after_acceptance: MissPowerLawEstimator = field(
        default_factory=lambda: MissPowerLawEstimator(DEFAULT_MISS_AFTER_ACCEPTANCE)
    )
    _spreads: dict[int, GuessSpread] = field(default_factory=dict)
    _num_outcomes: int = 0

    @property
    def acceptance(self) -> float:
        """Acceptance rate a of draft tokens, 0 to 1."""
        return self._acceptance.value

    @property
    def miss_laws(self) -> tuple[PowerLaw, PowerLaw]:
        """Power laws of the miss rate of F guesses: after a rejection, and after everything was accepted."""
        return self._after_rejection.value, self._after_acceptance.value

    def observe_outcome(self, path: Sequence[Node], num_accepted: int, bonus_token: int) -> None:
        """Take in how a round with the in-flight `path` ended."""
        k = num_accepted
        draft_token = path[k + 1].token if k + 1 < len(path) else None
        guesses = path[k].guesses(draft_token) if path[k].is_computed else None
        self.observe(k, len(path) - 1, guesses, bonus_token, num_drafted_here(path))
        targets_tokens = [*(node.token for node in path[1 : k + 1]), bonus_token]
        for node, token in zip(path, targets_tokens, strict=False):
            if node.ranks is not None and node.ranks.scores:
                rank = node.ranks.drafted.index(token) if token in node.ranks.drafted else None
                self.calibration.observe(node.ranks.scores, rank)

    def observe(
        self, num_accepted: int, num_draft: int, guesses: Sequence[int] | None, bonus_token: int, num_own: int
    ) -> None:
        """Take in one outcome of verifying `num_draft` tokens, the first `num_own` of which this draft drafts, too.

        `guesses` are the ranked ones at its accepted length, None if there were none yet.
        """
        self._acceptance.observe(min(num_accepted, num_own), num_own)
        if guesses is not None:
            rank = guesses.index(bonus_token) if bonus_token in guesses else None
            law = self._after_acceptance if num_accepted == num_draft else self._after_rejection
            law.observe(rank, len(guesses))
        self._num_outcomes += 1
        if self._num_outcomes % _REFIT_EVERY == 0:
            self._spreads.clear()

    def spread(self, lookahead: int) -> GuessSpread:
        """How to guess the outcome of verifying `lookahead` draft tokens."""
        spread = self._spreads.get(lookahead)
        if spread is None:
            spread = self._spreads[lookahead] = self._fit(lookahead)
        return spread

    def _fit(self, lookahead: int) -> GuessSpread:
        acceptance = self.acceptance
        if self.policy == "best_first" and self.has_probabilities:
            return GuessSpread((), (), acceptance, self.budget)
        laws = self.miss_laws
        if self.policy == "uniform":
            fan_out = uniform_fan_out(self.budget, lookahead)
        else:
            fan_out = geometric_fan_out(self.budget, lookahead, acceptance, *laws)
        law_of = [laws[0]] * lookahead + [laws[1]]
        return GuessSpread(
            fan_out,
            tuple(
                tuple(p * (law.miss_rate(i) - law.miss_rate(i + 1)) for i in range(count))
                for p, law, count in zip(outcome_probabilities(lookahead, acceptance), law_of, fan_out, strict=True)
            ),
            acceptance,
        )


def num_drafted_here(path: Sequence[Node]) -> int:
    """Number of a path's draft tokens that are, from the first one on, what this draft drafts."""
    for index, node in enumerate(path[:-1]):
        if node.ranks is None or node.ranks.drafted[0] != path[index + 1].token:
            return index
    return len(path) - 1
