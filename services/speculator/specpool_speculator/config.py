"""Settings of the speculator service."""

from __future__ import annotations

from typing import ClassVar, Final, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from specpool.config import Share, invalid
from specpool_engine.distributions.choices import BodyType, TransportChoice
from specpool_engine.runtime.settings import EngineConfig

FanOutPolicy = Literal["best_first", "geometric", "uniform"]
_LARGEST_COUNT: Final = 2**31 - 1
"""What is told to others has 32 bits there."""


class SpeculatorConfig(EngineConfig):
    """One speculator process."""

    role: ClassVar = "speculator"

    sm_share: Share = 1.0
    """Share of the GPU's multiprocessors that draft steps use, by a green context: leaves the others to a target on the
    same GPU, where both are clients of CUDA's multi-process service."""
    weights: Literal["plain", "prepacked", "streamed", "int8", "int4", "gguf"] = "plain"
    """How linear layers hold their weights."""
    draft_vocab_size: NonNegativeInt = 0
    """Draft only the first so many tokens, in byte-pair vocabularies the frequent ones, and the special tokens; 0: all.
    A smaller head makes draft steps faster; what is generated stays the same."""
    row_budget: int = Field(default=16, ge=1, le=_LARGEST_COUNT)
    """Branch rows per draft step, shared by all sequences; at most so many with `skip_costly_rows`."""
    skip_costly_rows: bool = True
    """Leave out rows that would bring less than they delay the others, by measured step times."""
    fan_out_budget: PositiveInt = 12
    """Guesses of the verification outcome per sequence and round (B)."""
    fan_out_policy: FanOutPolicy = "best_first"
    """How guesses and rows are chosen: `best_first` by the draft's own calibrated probabilities, `geometric` by mean
    acceptance and miss rates, as in the paper, `uniform` the same number after every accepted length."""
    saguaro_constant: float = Field(default=1.0, ge=0, le=1)
    """C of Saguaro sampling for rejection verification, 0 to 1; 1 is off."""
    tune_saguaro: bool = False
    """Choose C online, for tokens per second, instead of `saguaro_constant`."""
    distribution_top_m: PositiveInt = 64
    """Rejection verification: the draft samples from its m most likely tokens."""
    distribution_transport: TransportChoice = "auto"
    """Rejection verification: how distributions may travel to targets. `grpc` is sparse, inside the stream; `gloo` and
    `nccl` are dense, over a process group per target; `auto` is whatever the target asks for and this process has."""
    distribution_dtype: BodyType = "float16"
    """Type in which dense distributions are held and sent; the draft samples from what it leaves of them."""
    distribution_memory_bytes: NonNegativeInt = 1 << 30
    """Most that dense distributions of all branches may take; beyond it branches have sparse ones."""
    max_prefill_tokens: PositiveInt = 512
    """Prompt and catch-up tokens per draft step."""
    max_sequences: int = Field(default=256, ge=1, le=_LARGEST_COUNT)
    """Sequences held at once; more are refused, so that their targets take them elsewhere."""

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        is_split = self.tensor_parallel > 1
        if self.sm_share < 1 and self.stream_priority == "high":
            raise invalid("sm_share", self.sm_share, "1 where stream_priority is high")
        if self.sm_share < 1 and is_split:
            raise invalid("sm_share", self.sm_share, "1 where tensor_parallel is not 1")
        return self
