"""What an engine needs from a model: one forward over segments of many sequences.

Shapes: T = tokens of all segments together, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specpool.errors import ContextLengthExceeded, InvalidArgument, SpecPoolError
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens that one sequence or branch adds to a forward."""

    kv: SequenceKV
    """Block table that the keys and values go to; `tokens[0]` is at position `kv.length`."""
    tokens: Sequence[int]
    """Tokens to compute, at least one, none of them written yet."""
    num_logits: int = 1
    """Number of the last tokens that logits are returned for; 0 for all but the last chunk of a prefill."""


class CausalModel(Protocol):
    """A decoder over a paged KV cache. Used from one thread only."""

    vocab_size: int
    max_context: int
    pool: BlockPool
    device: torch.device

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Logits [sum of num_logits, V] float32 in the order of the segments.

        Reserves room, executes queued copies, writes keys and values, and advances every `kv`. Raises `KVCacheFull`
        or `ContextLengthExceeded` before anything changed.
        """
        ...


@runtime_checkable
class LaunchingModel(CausalModel, Protocol):
    """A model that computes beside the interpreter: while its forward runs, its engine's thread is free."""

    def launch(self, segments: Sequence[Segment]) -> Callable[[], Tensor]:
        """Start a forward; what is returned waits for its end and gives the logits.

        Until then no other forward may start. Raises what `forward` raises, before anything changed.
        """
        ...


@runtime_checkable
class EnqueuingModel(CausalModel, Protocol):
    """A model whose `forward` may return as soon as a device has been given its work, as on CUDA."""

    enqueues: bool
    """Whether `forward` does so: its logits are there once the current stream is synchronised."""


Forward = Callable[[Sequence[Segment], Callable[[], None]], Tensor]
"""A forward, and what to do while it runs, or before it if the model needs the thread."""


def forward_of(model: CausalModel) -> Forward:
    """The way to run forwards of a model with something to do meanwhile.

    The logits of a model that enqueues may not be there yet when it returns.
    """
    if isinstance(model, EnqueuingModel) and model.enqueues:

        def enqueue(segments: Sequence[Segment], meanwhile: Callable[[], None]) -> Tensor:
            logits = model.forward(segments)
            meanwhile()
            return logits

        return enqueue

    if not isinstance(model, LaunchingModel):

        def forward(segments: Sequence[Segment], meanwhile: Callable[[], None]) -> Tensor:
            meanwhile()
            return model.forward(segments)

        return forward

    def launch(segments: Sequence[Segment], meanwhile: Callable[[], None]) -> Tensor:
        logits = model.launch(segments)
        meanwhile()
        return logits()

    return launch


@runtime_checkable
class DistributedModel(CausalModel, Protocol):
    """A model whose forward needs other processes too."""

    def on_lost(self, listener: Callable[[SpecPoolError], None]) -> None:
        """Call `listener` from another thread, once, when the model cannot go on, also while nothing is computed."""
        ...

    def close(self) -> None:
        """End the other processes; no forward may run or come after."""
        ...


def watch_model(model: CausalModel, listener: Callable[[SpecPoolError], None]) -> None:
    """Have `listener` told when a model is lost; one that lives in this process alone never is."""
    if isinstance(model, DistributedModel):
        model.on_lost(listener)


def close_model(model: CausalModel) -> None:
    """End what a model started besides itself."""
    if isinstance(model, DistributedModel):
        model.close()


def check_segments(segments: Sequence[Segment], *, max_context: int, vocab_size: int) -> None:
    """Refuse segments that no model can run. Raises the typed error of the first."""
    if len({id(segment.kv) for segment in segments}) != len(segments):
        raise InvalidArgument("a sequence may appear only once in a forward: fork it to run branches")
    for segment in segments:
        num_tokens, end = len(segment.tokens), segment.kv.length + len(segment.tokens)
        if not 0 <= segment.num_logits <= num_tokens or num_tokens == 0:
            raise InvalidArgument(
                f"a segment needs at least one token and 0 <= num_logits <= tokens, "
                f"got {num_tokens} tokens and num_logits {segment.num_logits}"
            )
        if end > max_context:
            raise ContextLengthExceeded(
                f"{end} tokens do not fit into the model's context of {max_context}",
                metadata={"num_tokens": end, "max_context": max_context},
            )
        if not (min(segment.tokens) >= 0 and max(segment.tokens) < vocab_size):
            raise InvalidArgument(f"token ids must be in [0, {vocab_size}), got {list(segment.tokens)[:8]}")
