"""Prompt lookup: the backup that drafts for free by copying what followed the same words before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PromptLookup:
    """Incremental index of one sequence: where each n-gram was last followed by something.

    Adding a token and proposing cost O(max_ngram), whatever the length of the sequence.
    """

    def __init__(self, tokens: Iterable[int] = (), *, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {max_ngram}")
        self._max_ngram = max_ngram
        self._tokens: list[int] = []
        # n-gram -> index after its latest occurrence that is not the end of the sequence
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens to the sequence."""
        known, after, longest = self._tokens, self._after, self._max_ngram
        for token in tokens:
            end, suffix = len(known), tuple(known[-longest:])
            while suffix:
                after[suffix] = end
                suffix = suffix[1:]
            known.append(token)

    def propose(self, num_tokens: int, *, after: Sequence[int] = (), min_ngram: int = 1) -> list[int]:
        """The tokens, up to ``num_tokens``, that followed the latest earlier occurrence of the longest known suffix.

        Args:
            num_tokens: at most so many are proposed.
            after: tokens that are not committed, assumed to come next; looked up, but not searched.
            min_ngram: shorter matches do not count.
        """
        ending = (*self._tokens[-self._max_ngram :], *after)[-self._max_ngram :]
        while len(ending) >= max(min_ngram, 1):
            start = self._after.get(ending)
            if start is not None:
                return self._tokens[start : start + num_tokens]
            ending = ending[1:]
        return []
