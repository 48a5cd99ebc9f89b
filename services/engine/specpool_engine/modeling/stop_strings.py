"""Stop strings in text that comes in pieces: what completes one, and what may still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that ends first, in time that does not depend on where the pieces are cut.

    Knuth, Morris and Pratt's search, one state per stop string: the length of its longest beginning that the text ends
    with. A character costs a few steps per stop string, however long that is.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._failures = [_failures_of(s) for s in self._stop]
        self._matched = [0] * len(self._stop)
        self._first = frozenset(s[0] for s in self._stop)

    @property
    def num_held_back(self) -> int:
        """Number of characters at the end of the text that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def push(self, piece: str) -> int | None:
        """Add text; returns where the stop string begins that it completes: characters from the start of `piece`.

        The number is negative where the stop string began in an earlier piece. None: no stop string is complete.
        Nothing may be pushed after one was found.
        """
        if not self._stop:
            return None
        is_matching = any(self._matched)
        for position, character in enumerate(piece, start=1):
            if not is_matching and character not in self._first:
                continue
            complete = [len(stop) for index, stop in enumerate(self._stop) if self._advance(index, character)]
            if complete:
                return position - max(complete)
            is_matching = any(self._matched)
        return None

    def _advance(self, index: int, character: str) -> bool:
        stop, failures, matched = self._stop[index], self._failures[index], self._matched[index]
        while matched and stop[matched] != character:
            matched = failures[matched - 1]
        if stop[matched] == character:
            matched += 1
        self._matched[index] = matched
        return matched == len(stop)


def _failures_of(stop: str) -> list[int]:
    """The length of the longest shorter beginning of `stop` that each of its beginnings ends with."""
    failures = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = failures[matched - 1]
        if stop[matched] == stop[index]:
            matched += 1
        failures[index] = matched
    return failures
