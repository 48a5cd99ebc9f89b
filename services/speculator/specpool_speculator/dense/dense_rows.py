"""Dense draft distributions that the draft tree holds until their branch is selected or dropped, bounded as a whole."""

from __future__ import annotations

from torch import Tensor


class RowMemory:
    """The memory that all dense rows of a speculator may take together, in bytes."""

    def __init__(self, limit: int) -> None:
        """Allow `limit` bytes at most."""
        self.limit = limit
        self.used = 0
        """Bytes that are held now."""

    def has_room(self, num_bytes: int) -> bool:
        """Whether `num_bytes` more may be held."""
        return self.used + num_bytes <= self.limit


class DenseRow:
    """The dense distribution [V'] that one drafted token was sampled from.

    Nodes refer to their parents and children, so Python would free a dropped branch whenever it pleases: rows are given
    back by `release`.
    """

    __slots__ = ("_memory", "probabilities")

    def __init__(self, probabilities: Tensor, memory: RowMemory) -> None:
        """Keep a copy of `probabilities` [V'], rounded: a row of a step's matrix would keep all of it."""
        self.probabilities: Tensor | None = probabilities.clone()
        """The probabilities [V'] on the draft's device; None once released."""
        self._memory = memory
        memory.used += self.probabilities.nbytes

    def release(self) -> None:
        """Give the memory back: the row is not needed any more."""
        if self.probabilities is not None:
            self._memory.used -= self.probabilities.nbytes
            self.probabilities = None
