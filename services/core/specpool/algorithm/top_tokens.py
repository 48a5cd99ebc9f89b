"""The likeliest tokens of a large vocabulary, without sorting through all of it.

Shapes: N rows, V vocabulary, B blocks of W consecutive tokens; what is left of V fills no block.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_BLOCK_SIZE: Final = 64  # W
_MIN_BLOCKS_PER_TOKEN: Final = 4
"""Fewest blocks per token for which the search by blocks is used: with fewer, it saves little."""


def top_tokens(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and token ids [N, k] of the k largest `scores` [N, V], the largest first; like `torch.topk` with k <= V.

    They lie in the k blocks with the largest maxima: on a CPU this is several times faster than `topk` over V. Which of
    equal scores are taken is not defined.
    """
    num_rows, vocab_size = scores.shape
    if vocab_size < _MIN_BLOCKS_PER_TOKEN * k * _BLOCK_SIZE:
        values, tokens = scores.topk(k, dim=1)
        return values, tokens
    num_blocks, num_left = divmod(vocab_size, _BLOCK_SIZE)
    first_left = vocab_size - num_left
    blocks = scores[:, :first_left].view(num_rows, num_blocks, _BLOCK_SIZE)
    chosen = blocks.amax(dim=2).topk(k, dim=1).indices[:, :, None].expand(num_rows, k, _BLOCK_SIZE)  # of B
    lanes = torch.arange(_BLOCK_SIZE, device=scores.device)
    candidates = (chosen * _BLOCK_SIZE + lanes).flatten(1)
    # The last tokens, which fill no block, are candidates in any case.
    left = torch.arange(first_left, vocab_size, device=scores.device).expand(num_rows, num_left)
    candidate_scores = torch.cat((blocks.gather(1, chosen).flatten(1), scores[:, first_left:]), dim=1)
    values, places = candidate_scores.topk(k, dim=1)
    return values, torch.cat((candidates, left), dim=1).gather(1, places)
