"""The distributions that drafted tokens were sampled from, as rejection verification needs them.

Shape legend: D drafted tokens; B sequences; V vocabulary; m kept tokens of a sparse distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class DraftDistribution(ABC):
    """The exact distributions that D drafted tokens were sampled from."""

    @abstractmethod
    def probability_of(self, tokens: Tensor) -> Tensor:
        """Probability of ``tokens`` [D], each under its own distribution, float [D]."""

    @abstractmethod
    def residual(self, target: Tensor, index: Tensor) -> Tensor:
        """max(target - draft, 0) for ``target`` probabilities [B, V] and distributions ``index`` [B]."""

    @abstractmethod
    def narrow(self, num_draft: int) -> DraftDistribution:
        """The first ``num_draft`` distributions (when fewer tokens were used than drafted)."""


@dataclass(frozen=True, slots=True)
class SparseDistribution(DraftDistribution):
    """Few tokens that the draft sampled from: these (id, probability) pairs are all of it."""

    token_ids: Tensor
    """Token ids, int64 [D, m], distinct in a row (padding has probability 0)."""
    probabilities: Tensor
    """Probabilities, float [D, m]; rows sum to 1."""

    def probability_of(self, tokens: Tensor) -> Tensor:
        return torch.where(self.token_ids == tokens[:, None], self.probabilities, 0).sum(dim=1)

    def residual(self, target: Tensor, index: Tensor) -> Tensor:
        draft = self.probabilities[index].to(target.dtype)
        return target.scatter_add(1, self.token_ids[index], -draft).clamp_(min=0)

    def narrow(self, num_draft: int) -> SparseDistribution:
        return SparseDistribution(self.token_ids[:num_draft], self.probabilities[:num_draft])


@dataclass(frozen=True, slots=True)
class DenseDistribution(DraftDistribution):
    """A probability for every token."""

    probabilities: Tensor
    """Probabilities, float [D, V]; rows sum to 1."""

    @classmethod
    def from_rounded(cls, rounded: Tensor) -> DenseDistribution:
        """The distributions sampled from, by probabilities [D, V] in a type with few digits, which sum to about 1."""
        exact = rounded.float()
        return cls(exact / exact.sum(dim=1, keepdim=True))

    def probability_of(self, tokens: Tensor) -> Tensor:
        return self.probabilities.gather(1, tokens[:, None])[:, 0]

    def residual(self, target: Tensor, index: Tensor) -> Tensor:
        return (target - self.probabilities[index].to(target.dtype)).clamp_(min=0)

    def narrow(self, num_draft: int) -> DenseDistribution:
        return DenseDistribution(self.probabilities[:num_draft])
