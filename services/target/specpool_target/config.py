"""Settings of the target service."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from specpool_engine.distributions.choices import TransportChoice
from specpool_engine.runtime.settings import EngineConfig

Fallback = Literal["auto", "wait", "backup"]


class TargetConfig(EngineConfig):
    """One target process."""

    role: ClassVar = "target"

    weights: Literal["plain", "prepacked", "streamed", "int4", "gguf"] = "plain"
    """How linear layers hold their weights."""
    max_batch_size: PositiveInt = 32
    """Sequences in the batch at once; more wait."""
    max_batch_tokens: PositiveInt = 512
    """Tokens of one forward; longer prompts are prefilled in chunks."""
    max_prefill_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of a forward's time that prompts may take while others decode: 0.5 makes their rounds twice as long, at
    long contexts up to three times. Less is gentler to others, and a longer wait for first tokens."""
    max_waiting: NonNegativeInt = 256
    """Sequences that may wait for admission; more are refused."""
    max_context: NonNegativeInt = 0
    """Longest sequence, prompt and output; 0 for the model's own limit."""
    speculation_deadline_ms: NonNegativeFloat = 1000.0
    """Upper bound of any wait for a speculation; then the sequence goes on without."""
    distribution_transport: TransportChoice = "grpc"
    """How draft distributions of rejection verification come: `grpc` is sparse, inside the stream; `gloo` and `nccl`
    are dense, over a process group per speculator; `auto` is the first of nccl, gloo, grpc that both sides have. A
    speculator that does not have what is named here is not used."""
    distribution_deadline_ms: NonNegativeFloat = 20.0
    """Longest wait, after the forward, for draft distributions of rejection verification."""
    speculators: str = "router"
    """Where speculators are found: `router` (what routers tell), `static:HOST:PORT,...`, `dns:NAME:PORT` (all addresses
    of a name) or `kubernetes:NAMESPACE/LABELS`."""
    labels: tuple[str, ...] = ()
    """Where this target runs, `node=NAME`, `zone=NAME`, `region=NAME` or `rack=NAME`: near speculators come first."""
    connect_deadline_ms: NonNegativeFloat = 250.0
    """Longest wait of a request for the first connection to a speculator nobody used before."""
    fallback: Fallback = "auto"
    """After a miss: `auto` waits for the speculator where that is expected to be faster, `wait` always does, `backup`
    never."""
    backup_ngram: NonNegativeInt = 3
    """Longest n-gram of the prompt-lookup backup; 0 is no backup."""
