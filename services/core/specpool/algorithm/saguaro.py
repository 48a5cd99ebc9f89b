"""Saguaro sampling: a draft distribution that steers the target's corrections into the speculation cache.

sigma_{F,C}(z) is proportional to C exp(z_t) for the F most likely tokens and to exp(z_t) for the others.
The smaller C, the more of the residual max(target - draft, 0) lies on these F tokens (which the cache
guesses), and the less is accepted.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def saguaro_scores(scores: Tensor, fan_out: int, constant: float) -> Tensor:
    """Scores [N, V] whose softmax is sigma_{fan_out, constant}.

    Rows with no token outside the top ``fan_out`` stay as they are: there C = 0 would leave nothing.
    """
    if not 0 <= constant <= 1:
        raise ValueError(f"the Saguaro constant must be between 0 and 1, got {constant}")
    num_top = min(fan_out, scores.shape[1])
    if constant == 1 or num_top <= 0:
        return scores
    top = scores.topk(num_top, dim=1).indices
    shift = math.log(constant) if constant > 0 else -torch.inf
    changed = scores.scatter_add(1, top, torch.full_like(top, shift, dtype=scores.dtype))
    some_left = (changed > -torch.inf).any(dim=1, keepdim=True)
    return torch.where(some_left, changed, scores)
