"""A head over the frequent part of the vocabulary, for drafts: a small model's head is a large share of its weights.

Tokens left out are never drafted, which costs acceptance where the target would have taken them and changes no output
(FR-Spec, arXiv 2502.14856, ranks tokens by frequency; byte-pair tokenizers number theirs in that order already).

Shapes: V = vocabulary size, N = tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from specpool.errors import InvalidArgument


class FrequentTokensHead(nn.Module):
    """Logits of the kept tokens; all others are -inf."""

    def __init__(self, head: nn.Linear, num_first: int, others: Iterable[int]) -> None:
        super().__init__()
        vocab_size = head.out_features
        self._num_first = num_first
        self._vocab_size = vocab_size
        self._others = torch.tensor(
            sorted({token for token in others if num_first <= token < vocab_size}),
            dtype=torch.long,
            device=head.weight.device,
        )
        self.tokens = torch.cat([torch.arange(num_first, device=head.weight.device), self._others])
        """The kept tokens [N], in the order of the rows of `kept`."""
        self.kept = nn.Linear(head.in_features, len(self.tokens), bias=head.bias is not None, device="meta")
        self.kept.weight = nn.Parameter(head.weight.detach()[self.tokens], requires_grad=False)
        if head.bias is not None:
            self.kept.bias = nn.Parameter(head.bias.detach()[self.tokens], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., V]
        """Logits over the whole vocabulary: -inf for tokens that were left out."""
        kept: Tensor = self.kept(x)  # [..., N]
        logits: Tensor = kept.new_full((*kept.shape[:-1], self._vocab_size), -torch.inf)
        logits[..., : self._num_first] = kept[..., : self._num_first]
        logits[..., self._others] = kept[..., self._num_first :]
        return logits


def keep_frequent_tokens(model: Any, num_first: int, others: Iterable[int]) -> None:
    """Give a `transformers` model a head over its first `num_first` tokens and `others`, such as special ones.

    Nothing changes if that is the whole vocabulary. Raises `InvalidArgument` for a model without a linear head.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InvalidArgument(
            f"{type(model).__name__} has no linear head: its vocabulary cannot be cut", metadata={"field": "vocab_size"}
        )
    if num_first < head.out_features:
        model.set_output_embeddings(FrequentTokensHead(head, num_first, others))
