"""The speculation cache and the prompt-lookup backup."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpool.algorithm.prompt_lookup import PromptLookup
from specpool.algorithm.speculation_cache import Lookup, LookupKind, SpeculationCache


def cache_with(entries: dict[tuple[int, int], list[int]], round_: int = 0) -> SpeculationCache:
    cache = SpeculationCache(lookahead=3)
    cache.update(round_, entries)
    return cache


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7, 8, 9], Lookup(LookupKind.HIT, (7, 8, 9))),
        ([7, 8, 9, 1], Lookup(LookupKind.HIT, (7, 8, 9))),
        ([7, 8], Lookup(LookupKind.PARTIAL, (7, 8))),
        ([], Lookup(LookupKind.LATE)),
    ],
)
def test_how_deep_a_guess_had_become(tokens: list[int], expected: Lookup) -> None:
    assert cache_with({(1, 5): tokens}).lookup(0, 1, 5) == expected


@pytest.mark.parametrize("outcome", [(1, 6), (2, 5), (0, 5)])
def test_another_outcome_misses_with_no_tokens(outcome: tuple[int, int]) -> None:
    assert cache_with({(1, 5): [7, 8, 9]}).lookup(0, *outcome) == Lookup(LookupKind.MISS)


def test_no_table_is_late() -> None:
    assert SpeculationCache(lookahead=3).lookup(0, 0, 1) == Lookup(LookupKind.LATE)
    assert cache_with({(0, 1): [2]}, round_=4).lookup(3, 0, 1) == Lookup(LookupKind.LATE)


def test_a_table_grows_and_never_shrinks() -> None:
    cache = cache_with({(0, 1): [2]})
    cache.update(0, {(0, 1): [2, 3], (1, 4): [5]})
    cache.update(0, {(0, 1): []})
    assert cache.num_guesses(0) == 2
    assert cache.lookup(0, 0, 1) == Lookup(LookupKind.PARTIAL, (2, 3))


def test_a_lookup_ends_its_round_and_older_ones() -> None:
    cache = cache_with({(0, 1): [2, 3, 4]}, round_=5)
    cache.update(4, {(0, 1): [9]})
    cache.update(6, {(0, 1): [8]})
    assert cache.lookup(5, 0, 1).kind is LookupKind.HIT
    cache.update(4, {(0, 1): [9]})
    cache.update(5, {(0, 1): [9]})
    assert cache.num_stale == 2
    assert cache.num_guesses(5) == 0
    assert cache.lookup(6, 0, 1).tokens == (8,)


def test_a_round_may_want_less() -> None:
    cache = cache_with({(0, 1): [2, 3, 4]})
    assert cache.lookup(0, 0, 1, lookahead=2) == Lookup(LookupKind.HIT, (2, 3))


def test_clearing_forgets_tables_but_not_which_rounds_ended() -> None:
    cache = cache_with({(0, 1): [2]})
    cache.lookup(0, 0, 1)
    cache.update(1, {(0, 1): [2]})
    cache.clear()
    assert cache.num_guesses(1) == 0
    cache.update(0, {(0, 1): [2]})
    assert cache.num_stale == 1


def longest_suffix_match(tokens: list[int], max_ngram: int, num_tokens: int) -> list[int]:
    """Prompt lookup by plain search."""
    for n in range(min(max_ngram, len(tokens)), 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + num_tokens]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(0, 6), st.integers(0, 40))
def test_prompt_lookup_equals_a_plain_search(tokens: list[int], max_ngram: int, num_tokens: int, split: int) -> None:
    expected = longest_suffix_match(tokens, max_ngram, num_tokens)
    assert PromptLookup(tokens, max_ngram=max_ngram).propose(num_tokens) == expected
    incremental = PromptLookup(tokens[:split], max_ngram=max_ngram)
    incremental.extend(tokens[split:])
    assert incremental.propose(num_tokens) == expected


def test_prompt_lookup_copies_what_followed() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 2, 3]).propose(2) == [4, 5]
    assert PromptLookup([1, 2, 3]).propose(2) == []
    assert PromptLookup([]).propose(2) == []
