"""What a target said of a sequence when it opened it."""

from __future__ import annotations

from dataclasses import dataclass

from specpool.algorithm.sampling import SamplingParams
from specpool.algorithm.verification import VerificationMode


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOptions:
    """What a target said of a sequence when it opened it."""

    tenant: str
    """Name of the tenant, for sharing rows."""
    weight: float
    """Weight of the tenant, for sharing rows."""
    sampling: SamplingParams
    """Sampling parameters of the request."""
    verification: VerificationMode
    """How the target verifies."""
    seed: int
    """Seed of the request's noise."""
    num_prompt_tokens: int
    """Number of tokens at the beginning that are the prompt."""
    lookahead: int
    """Lookahead K: most draft tokens of a round."""
    speculates_ahead: bool
    """Whether it is drafted for ahead (mode SSD); the synchronous baseline (SD) drafts only when asked."""
    sends_distributions: bool
    """Whether the target needs the distributions of draft tokens."""
    vocab_size: int
    """Number of tokens that the target knows; the draft's vocabulary may be larger."""
    stop_tokens: frozenset[int]
    """Tokens that end the output: nothing is drafted after them."""
    max_length: int
    """Longest length in tokens; what is beyond it is never needed or cannot be computed."""
