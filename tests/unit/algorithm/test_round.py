"""The reference round over toy models: lossless in every mode, whatever the speculator does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specpool.algorithm.draft_distribution import SparseDistribution
from specpool.algorithm.draft_ranks import DraftRanks, draft_ranks
from specpool.algorithm.noise import gumbel_argmax
from specpool.algorithm.round import Draft, RoundState, speculative_round
from specpool.algorithm.speculation_cache import LookupKind, Outcome, SpeculationCache
from specpool.algorithm.verification import VerificationMode

VOCAB_SIZE = 6
LOOKAHEAD = 3
PROMPT = (1, 2, 3)
_generator = torch.Generator().manual_seed(11)
TARGET_TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, generator=_generator) * 1.5
GOOD_DRAFT = TARGET_TABLE + 0.7 * torch.randn(TARGET_TABLE.shape, generator=_generator)
BAD_DRAFT = torch.randn(TARGET_TABLE.shape, generator=_generator)


class ToyTarget:
    """The next token depends on the last two, through a table of logits."""

    def score(self, committed: Sequence[int], draft_tokens: Sequence[int]) -> Tensor:
        tokens = [*committed, *draft_tokens]
        first = len(committed)
        return torch.stack([TARGET_TABLE[tokens[i - 2], tokens[i - 1]] for i in range(first, len(tokens) + 1)])


@dataclass
class ToySpeculator:
    """Drafts from another table and guesses ``fan_out`` next tokens per accepted length."""

    table: Tensor
    mode: VerificationMode
    seed: int
    fan_out: int = 3
    depth: int = LOOKAHEAD
    constant: float = 0.5
    loses_distributions: bool = False
    known: dict[tuple[int, ...], DraftRanks] = field(default_factory=dict)

    def ranks(self, tokens: Sequence[int], num_ranks: int) -> DraftRanks:
        key = (tokens[-2], tokens[-1], len(tokens), num_ranks)
        if key not in self.known:
            self.known[key] = self._ranks(tokens, num_ranks)
        return self.known[key]

    def _ranks(self, tokens: Sequence[int], num_ranks: int) -> DraftRanks:
        return draft_ranks(
            self.table[tokens[-2], tokens[-1]][None],
            self.mode,
            num_ranks,
            seed=self.seed,
            positions=torch.tensor([len(tokens)]),
            saguaro_fan_out=self.fan_out,
            saguaro_constant=self.constant,
        )

    def draft(self, committed: Sequence[int]) -> list[int]:
        tokens = list(committed)
        for _ in range(self.depth):
            tokens.append(int(self.ranks(tokens, 1).token_ids[0, 0]))
        return tokens[len(committed) :]

    def speculate(self, committed: Sequence[int]) -> Draft:
        tokens = self.draft(committed)
        return Draft(tuple(tokens), self.distribution(committed, tokens))

    def predict(self, committed: Sequence[int], in_flight: Draft) -> Mapping[Outcome, Sequence[int]]:
        entries = {}
        for num_accepted in range(len(in_flight.tokens) + 1):
            prefix = [*committed, *in_flight.tokens[:num_accepted]]
            ranks = self.ranks(prefix, self.fan_out + 1)
            ends = num_accepted == len(in_flight.tokens)
            guesses = ranks.bonus_ids[0, :-1] if ends else ranks.token_ids[0, 1:]
            for guess in guesses.tolist():
                if guess >= 0:
                    entries[num_accepted, guess] = self.draft([*prefix, guess])
        return entries

    def distribution(self, committed: Sequence[int], tokens: Sequence[int]) -> SparseDistribution | None:
        if self.mode is not VerificationMode.REJECTION or self.loses_distributions or not tokens:
            return None
        prefixes = [[*committed, *tokens[:i]] for i in range(len(tokens))]
        parts = [self.ranks(prefix, 1).distribution for prefix in prefixes]
        return SparseDistribution(
            torch.cat([part.token_ids for part in parts if part is not None]),
            torch.cat([part.probabilities for part in parts if part is not None]),
        )


def generate(
    speculator: ToySpeculator, num_tokens: int, *, just_in_time: bool = False
) -> tuple[list[int], Counter[LookupKind], int]:
    """(tokens, lookups by kind, accepted tokens)."""
    state, cache = RoundState(PROMPT), SpeculationCache(LOOKAHEAD)
    kinds: Counter[LookupKind] = Counter()
    num_accepted = 0
    extra = {"fallback": speculator.speculate} if just_in_time else {}
    while len(state.committed) < len(PROMPT) + num_tokens:
        result = speculative_round(
            state, ToyTarget(), speculator, cache, mode=speculator.mode, seed=speculator.seed, **extra
        )
        state = result.state
        kinds[result.lookup.kind] += 1
        num_accepted += result.outcome.num_accepted
    return list(state.committed[len(PROMPT) :][:num_tokens]), kinds, num_accepted


def plain(mode: VerificationMode, seed: int, num_tokens: int) -> list[int]:
    """The target alone, token by token."""
    tokens = list(PROMPT)
    for _ in range(num_tokens):
        scores = TARGET_TABLE[tokens[-2], tokens[-1]][None]
        greedy = mode is VerificationMode.GREEDY
        choice = scores.argmax(1) if greedy else gumbel_argmax(scores, seed, torch.tensor([len(tokens)]))
        tokens.append(int(choice))
    return tokens[len(PROMPT) :]


SPECULATORS = {
    "good": {"table": GOOD_DRAFT},
    "perfect": {"table": TARGET_TABLE},
    "bad": {"table": BAD_DRAFT},
    "shallow": {"table": GOOD_DRAFT, "depth": 1},
    "no-depth": {"table": GOOD_DRAFT, "depth": 0},
    "no-guesses": {"table": GOOD_DRAFT, "fan_out": 0},
}


@pytest.mark.parametrize("just_in_time", [False, True], ids=["backup", "just-in-time"])
@pytest.mark.parametrize("name", SPECULATORS)
@pytest.mark.parametrize("mode", [VerificationMode.GREEDY, VerificationMode.COUPLED])
def test_the_text_is_the_targets_own(mode: VerificationMode, name: str, just_in_time: bool) -> None:
    for seed in range(3):
        speculator = ToySpeculator(mode=mode, seed=seed, **SPECULATORS[name])  # type: ignore[arg-type]
        tokens, _, _ = generate(speculator, 40, just_in_time=just_in_time)
        assert tokens == plain(mode, seed, 40)


def test_a_good_speculator_hits_and_is_accepted() -> None:
    """Losslessness alone could come from never speculating."""
    speculator = ToySpeculator(mode=VerificationMode.COUPLED, seed=1, table=GOOD_DRAFT)
    _, kinds, num_accepted = generate(speculator, 200)
    assert kinds[LookupKind.HIT] > 0.6 * kinds.total()
    assert num_accepted > 80
    perfect = ToySpeculator(mode=VerificationMode.COUPLED, seed=1, table=TARGET_TABLE)
    _, kinds, num_accepted = generate(perfect, 200)
    assert set(kinds) == {LookupKind.HIT}
    assert num_accepted >= (200 // (LOOKAHEAD + 1) - 1) * LOOKAHEAD


def test_partial_depth_and_missing_guesses_are_seen() -> None:
    shallow = ToySpeculator(mode=VerificationMode.GREEDY, seed=0, table=TARGET_TABLE, depth=1)
    assert set(generate(shallow, 20)[1]) == {LookupKind.PARTIAL}
    silent = ToySpeculator(mode=VerificationMode.GREEDY, seed=0, table=TARGET_TABLE, fan_out=0)
    assert set(generate(silent, 20)[1]) == {LookupKind.MISS}


@pytest.mark.parametrize(("constant", "late"), [(0.0, False), (0.5, False), (1.0, False), (0.5, True)], ids=str)
def test_rejection_rounds_have_the_targets_distribution(constant: float, late: bool) -> None:
    """A few hundred whole requests; the sharp tests of rejection are in test_lossless."""
    num_samples, num_tokens = 300, 2
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(num_samples):
        speculator = ToySpeculator(
            mode=VerificationMode.REJECTION,
            seed=seed,
            table=GOOD_DRAFT,
            constant=constant,
            fan_out=2,
            depth=1,
            loses_distributions=late,
        )
        tokens, _, _ = generate(speculator, num_tokens)
        counts[tuple(tokens)] += 1
    first = TARGET_TABLE[PROMPT[-2], PROMPT[-1]].double().softmax(0)
    second = TARGET_TABLE[PROMPT[-1]].double().softmax(1)
    exact = (first[:, None] * second).flatten()
    observed = torch.tensor([counts[divmod(i, VOCAB_SIZE)] for i in range(VOCAB_SIZE**2)])
    # cells too small for chi-square are taken together
    rare = exact * num_samples < 5
    pooled = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((exact[~rare], exact[rare].sum()[None])) * num_samples
    assert chisquare(pooled.numpy(), expected.numpy()).pvalue > 1e-3
