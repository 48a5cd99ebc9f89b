"""Any `transformers` decoder over the paged KV cache.

The model's own code runs unchanged: it is given one packed row of tokens with explicit positions, and an attention
implementation that writes keys and values into the blocks and attends over them. So every linear layer sees a
single [T, hidden] matrix, however many sequences the tokens belong to.

Shapes: T = packed tokens, V = vocabulary size, Hkv = key/value heads, D = head dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import AttentionBackend, KVStorage, PackedAttention
from specpool_engine.modeling.cpu.operators import define_operator
from specpool_engine.modeling.interface import Segment, check_segments
from specpool_engine.modeling.packed_inputs import PackedInputs, SmallForwards, pack
from specpool_engine.modeling.paged_kv import BlockPool, reserve_all

PAGED_ATTENTION = "specpool_paged"
"""Name under which `transformers` finds our attention. No mask function is registered for it: it builds no masks."""

Copies = tuple[list[int], list[int]]
"""Blocks to copy, as sources and destinations: all are read before any is written."""

_running = threading.local()
"""The forward that runs in this thread, as `step`: an operator takes tensors and numbers only, so it looks here."""


def _paged_attention(
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:  # [1, T, H, D]
    """Write the keys and values of one layer, and attend. An operator, so that a compiler leaves it as it is.

    It is declared to change nothing: the cache is no tensor of the graph, and every layer needs the one before.
    """
    step: _Step = _running.step
    num_tokens = step.slots.shape[0]
    num_padding = query.shape[2] - num_tokens
    if num_padding:
        query, key, value = (states[:, :, :num_tokens] for states in (query, key, value))
    step.write(layer, key, value)
    output = step.attention.attend(layer, query, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
    return F.pad(output, (0, 0, 0, 0, 0, num_padding)) if num_padding else output.contiguous()


_attend = define_operator(
    "paged_attention(Tensor query, Tensor key, Tensor value, int layer, float scaling, int? sliding_window, "
    "float? softcap) -> Tensor",
    _paged_attention,
    fake=lambda query, *_: query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]),
)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that `transformers` models call."""
    del attention_mask
    if s_aux is not None:
        raise unsupported(module, "its attention has sinks")
    layer = module.layer_idx
    assert isinstance(layer, int)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attend(query, key, value, layer, scaling, sliding_window, softcap), None


AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def unsupported(subject: object, why: str) -> InvalidArgument:
    """The error for a model whose attention the paged cache cannot serve."""
    return InvalidArgument(
        f"{type(subject).__name__} is not supported: {why}", reason="MODEL_UNSUPPORTED", metadata={"why": why}
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward, as its attention layers see it."""

    backend: AttentionBackend
    storage: KVStorage
    attention: PackedAttention
    slots: Tensor
    """Slots [T] of the flattened cache for the packed tokens' keys and values. Rows after these are padding."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:  # [1, Hkv, T, D]
        """Write keys and values of a layer into the blocks: attention reads them from there."""
        expected = self.storage.keys.shape[3:]
        for states in (key, value):
            if (states.shape[1], states.shape[3]) != expected:
                raise unsupported(
                    self, f"a layer's keys have shape {(states.shape[1], states.shape[3])}, {tuple(expected)} expected"
                )
        self.backend.write(self.storage, layer, key, value, self.slots)


class TransformersModel:
    """A `CausalModel` over a `transformers` causal language model."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pool: BlockPool,
        backend: AttentionBackend,
        max_context: int | None = None,
        num_shards: int = 1,
    ) -> None:
        """`model` holds one of `num_shards` equal parts of the heads, and so does its KV cache."""
        config: Any = model.config.get_text_config()
        geometry = KVGeometry.of(config, num_shards)
        backend.check(dtype=model.dtype, device=model.device, block_size=pool.block_size, head_dim=geometry.head_dim)
        self.model = model.eval()
        model.set_attn_implementation(PAGED_ATTENTION)
        self.pool = pool
        self.backend = backend
        self.device = model.device
        self.enqueues = self.device.type == "cuda"
        self.min_tokens = 1
        """Forwards of fewer tokens are padded to this many."""
        self.around_forward: Callable[[], AbstractContextManager[object]] = nullcontext
        """Entered for every forward."""
        self.graphs: SmallForwards | None = None
        """CUDA graphs of small forwards, if there are any."""
        self.vocab_size: int = config.vocab_size
        self.max_context: int = max_context or config.max_position_embeddings
        self.storage = KVStorage.allocate(
            num_layers=geometry.num_layers,
            num_blocks=pool.num_blocks + 1,  # one that no sequence has, for what padding writes
            block_size=pool.block_size,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=model.dtype,
            device=self.device,
        )

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Logits [sum of num_logits, V] float32."""
        logits = self.execute(segments, self.reserve(segments))
        for segment in segments:
            segment.kv.advance(len(segment.tokens))
        return logits

    def reserve(self, segments: Sequence[Segment]) -> Copies:
        """Check the segments and make room for them; returns the copies of blocks that this makes necessary."""
        check_segments(segments, max_context=self.max_context, vocab_size=self.vocab_size)
        reserve_all(self.pool, ((segment.kv, len(segment.tokens)) for segment in segments))
        return self.pool.take_copies()

    @torch.inference_mode()
    def execute(self, segments: Sequence[Segment], copies: Copies) -> Tensor:
        """Logits [sum of num_logits, V] float32 of segments that have room. Reads block tables, changes none."""
        sources, destinations = copies
        if destinations:
            self.storage.copy_blocks(sources, destinations)
        return self._run(segments)

    def _run(self, segments: Sequence[Segment]) -> Tensor:
        packed = pack(segments)
        inputs = PackedInputs.of(segments, packed, self.pool.block_size)
        if self.graphs is not None and (logits := self.graphs.run(packed, inputs)) is not None:
            return logits
        padding = [0] * (self.min_tokens - len(inputs.tokens))
        return self.compute(
            self.backend.prepare(packed, self.storage),
            tokens=self._tensor(inputs.tokens + padding),
            positions=self._tensor(inputs.positions + padding),
            slots=self._tensor(inputs.slots),
            logit_rows=self._tensor(inputs.logit_rows),
        )

    def compute(
        self,
        attention: PackedAttention,
        *,
        tokens: Tensor,  # [T]
        positions: Tensor,  # [T]
        slots: Tensor,  # [T], or fewer: tokens after these are padding
        logit_rows: Tensor,  # [rows]
    ) -> Tensor:  # [rows, V] float32
        """The forward's part on the device, logits [rows, V]: nothing but tensors that are there already."""
        _running.step = _Step(self.backend, self.storage, attention, slots)
        with self.around_forward():
            output = self.model(
                input_ids=tokens.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                logits_to_keep=logit_rows,
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


class KVGeometry:
    """Size of one token's keys and values."""

    def __init__(self, *, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    @classmethod
    def of(cls, config: Any, num_shards: int = 1) -> KVGeometry:
        """Read the sizes from a `transformers` text configuration, for one of `num_shards` equal parts of the heads."""
        heads = getattr(config, "num_attention_heads", None)
        if heads is None:
            raise unsupported(config, "its configuration names no attention heads")
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // num_shards,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize
