"""How many tokens of prompts a step computes beside running rounds, and whose.

A chunk of a prompt makes the forward longer for everybody in the batch. So it gets a share of the step's time, by what
forwards were measured to take; how many tokens that is depends on the hardware alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from specpool.algorithm.estimators import Average

_DECAY: Final = 0.9
"""Weight of a forward with prompts beside that of the next one: prompts get dearer with their length."""
_OLDEST_SHARE: Final = 0.25
"""Share of a step's prompt tokens that is for the prompt that has been in the batch longest, so that it gets on."""


class PrefillShare:
    """Measures forwards, and says how many prompt tokens are to be computed beside rounds."""

    def __init__(self, *, max_batch_tokens: int, max_share: float) -> None:
        """Make an estimator that has seen nothing.

        Args:
            max_batch_tokens: of one forward.
            max_share: share of a forward's time that prompts may take while rounds run, 0 to below 1.
        """
        self._max_batch_tokens = max_batch_tokens
        self._most = max_share / (1 - max_share)
        self._round_s = Average()
        self._prompt_s = 0.0
        self._num_prompt_tokens = 0.0

    def observe(self, num_round_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in a forward that computed rounds, prompts, or both."""
        if not num_prompt_tokens:
            self._round_s.observe(seconds)
            return
        added_s = seconds - (self._round_s.value if num_round_tokens else 0.0)
        self._prompt_s = self._prompt_s * _DECAY + max(0.0, added_s)
        self._num_prompt_tokens = self._num_prompt_tokens * _DECAY + num_prompt_tokens

    def num_tokens(self, num_round_tokens: int) -> int:
        """Most prompt tokens of a step whose rounds have `num_round_tokens`; at least one, or prompts might starve."""
        left = max(1, self._max_batch_tokens - num_round_tokens)
        if not num_round_tokens or not self._prompt_s or not self._round_s.value:
            return left  # nobody is held up, or nothing is known
        per_token_s = self._prompt_s / self._num_prompt_tokens
        return min(left, max(1, int(self._most * self._round_s.value / per_token_s)))


def allot(wanted: Sequence[int], num_tokens: int) -> list[int]:
    """How many of `num_tokens` tokens each prompt gets that still wants so many, the oldest prompt first.

    Short prompts do not wait behind long ones, and the oldest gets on all the same.
    """
    if not wanted:
        return []
    given = [0] * len(wanted)
    given[0] = min(wanted[0], max(1, int(num_tokens * _OLDEST_SHARE)), num_tokens)
    left = num_tokens - given[0]
    for index in sorted(range(len(wanted)), key=lambda one: wanted[one]):
        more = min(wanted[index] - given[index], left)
        given[index] += more
        left -= more
    return given
