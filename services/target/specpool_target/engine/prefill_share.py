"""How many tokens of prompts a step computes beside running rounds, and whose.

A chunk of a prompt makes the forward longer for everybody in the batch. So it gets a share of the step's time, by what
forwards were measured to take; how many tokens that is depends on the hardware and on how far the prompt has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from specpool.algorithm.estimators import Average
from specpool.algorithm.row_times import LinearTime

_ROUND_DECAY: Final = 0.97
"""Weight of a forward of rounds alone beside that of the next one."""
_GAIN: Final = 0.3
"""Power of what a chunk was allowed over what it took by which the next chunk changes."""
_LEAST_CHANGE: Final = 0.7
_MOST_CHANGE: Final = 1.5
"""Bounds of that change: one forward that was held up by something else says little."""
_MOST_OVERRUN: Final = 2.0
"""What a chunk may take at most over its allowance, where the chunk's own price would leave no room for tokens."""
_OLDEST_SHARE: Final = 0.25
"""Share of a step's prompt tokens that is for the prompt that has been in the batch longest, so that it gets on."""


class PrefillShare:
    """Measures forwards, and says how many prompt tokens are to be computed beside rounds.

    The number is steered, not computed from a price per token: a chunk has a price of its own, however short, since its
    attention reads the whole context. A price per token taken from a short chunk holds that, too, and would make the
    next one shorter still.
    """

    def __init__(self, *, max_batch_tokens: int, max_share: float) -> None:
        """Make an estimator that has seen nothing.

        Args:
            max_batch_tokens: of one forward.
            max_share: share of a forward's time that prompts may take while rounds run, 0 to below 1.
        """
        self._max_batch_tokens = max_batch_tokens
        self._most = max_share / (1 - max_share)
        self._round_s = LinearTime(decay=_ROUND_DECAY)
        self._token_s = Average()
        """Seconds of a prompt's token in a large chunk, most often with nobody beside it: where to begin."""
        self._chunk: float | None = None
        """Prompt tokens of the next step beside rounds, not rounded; None before the first one."""

    def observe(self, num_round_tokens: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in a forward that computed rounds, prompts, or both."""
        if not num_prompt_tokens:
            self._round_s.observe(num_round_tokens, seconds)
        elif not num_round_tokens:
            self._token_s.observe(seconds / num_prompt_tokens)
        elif (round_s := self._round_s(num_round_tokens)) > 0:
            added_s = seconds - round_s
            if self._token_s.is_empty and added_s > 0:
                self._token_s.observe(added_s / num_prompt_tokens)
            self._steer(num_prompt_tokens, self._allowed_s(round_s, num_prompt_tokens, added_s), added_s)

    def _allowed_s(self, round_s: float, num_tokens: int, added_s: float) -> float:
        """Seconds of a chunk beside rounds of `round_s`: its share, more where that is hardly its own price.

        Else a prompt would get on by a token or two at a time, and hold up the others by that price far more often.
        """
        own_s = max(0.0, added_s - num_tokens * self._token_s.value)
        share_s = self._most * round_s
        return min(max(share_s, 2 * own_s), _MOST_OVERRUN * share_s)

    def _steer(self, num_tokens: int, allowed_s: float, added_s: float) -> None:
        """Take in a chunk of `num_tokens` tokens that made a forward longer by `added_s`."""
        ratio = allowed_s / added_s if added_s > 0 else _MOST_CHANGE ** (1 / _GAIN)
        if self._chunk is None:
            self._chunk = num_tokens * ratio
        elif ratio < 1:
            self._chunk = min(self._chunk, num_tokens + 1) * max(_LEAST_CHANGE, ratio**_GAIN)
        elif num_tokens >= int(self._chunk):  # a shorter one would say nothing of longer ones
            self._chunk *= min(_MOST_CHANGE, ratio**_GAIN)
        self._chunk = min(max(1.0, self._chunk), float(self._max_batch_tokens))

    def num_tokens(self, num_round_tokens: int) -> int:
        """Most prompt tokens of a step whose rounds have `num_round_tokens`; at least one, or prompts might starve."""
        left = max(1, self._max_batch_tokens - num_round_tokens)
        if not num_round_tokens:
            return left  # nobody is held up
        chunk = self._chunk
        if chunk is None:
            round_s = self._round_s(num_round_tokens)
            if self._token_s.is_empty or not round_s:
                return left  # nothing is known
            chunk = self._most * round_s / self._token_s.value
        return min(left, max(1, int(chunk)))


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
