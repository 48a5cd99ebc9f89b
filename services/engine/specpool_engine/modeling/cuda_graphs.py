"""CUDA graphs of a model's forward: for small forwards, starting kernels one by one takes longer than running them.

A graph replays fixed kernels on fixed tensors. So there is one per *bucket*: a number of tokens to which a forward is
padded, once with and once without a prefix that branches share. A forward fills the tensors and replays; one that is
larger than every bucket runs as it would without graphs. Padding tokens write to a block that no sequence has, and
logits are computed for as many rows as there are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import AttentionBackend, PackedSegment
from specpool_engine.modeling.files import Progress
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.packed_inputs import PackedInputs
from specpool_engine.modeling.static_tensors import StaticTensors

CudaGraphs = Literal["auto", "on", "off"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of tokens of graphs; a step of decoding is bound by memory: padding to the next power of two costs little."""
_NUM_WARM_UPS = 2
"""Number of forwards before a capture, in which libraries allocate and choose kernels."""


def wants_graphs(setting: str, backend: AttentionBackend, device: torch.device) -> bool:
    """Whether to capture graphs: `auto` does so on CUDA, with a backend that can.

    Raises:
        InvalidArgument: CUDA_GRAPHS_UNAVAILABLE if they are asked for and cannot be had, or the setting is unknown.
    """
    accepted = get_args(CudaGraphs)
    if setting not in accepted:
        raise _refused(f"cuda_graphs must be one of {', '.join(accepted)}, got {setting!r}", setting)
    if setting == "off":
        return False
    if device.type == "cuda" and backend.has_static_attention:
        return True
    if setting == "auto":
        return False
    if device.type != "cuda":
        raise _refused(f"cuda_graphs on needs a CUDA device, and the device is {device}", setting)
    raise _refused(f"cuda_graphs on needs attention backend flash, and the backend is {backend.name}", setting)


def describe_graphs(setting: str, model: CausalModel, backend: AttentionBackend) -> str:
    """Whether CUDA graphs are on, or off and why, in words, for status."""
    if getattr(model, "graphs", None) is not None:
        return f"on, for forwards of up to {BUCKETS[-1]} tokens"
    if setting == "off":
        return "off, as cuda_graphs says"
    if model.device.type != "cuda":
        return f"off, since the device is {model.device}"
    if not backend.has_static_attention:
        return f"off, since the attention backend is {backend.name}"
    return "off, since this model is not computed by kernels of this process alone"


def choose_bucket(num_tokens: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds so many tokens; None if none does."""
    return min((bucket for bucket in buckets if bucket >= num_tokens), default=None)


class StaticForward:
    """A forward on tensors that stay where they are. Runs on any device; on CUDA it can be captured.

    Shapes: B = tokens of the bucket, V = vocabulary size.
    """

    def __init__(self, model: TransformersModel, max_tokens: int) -> None:
        attention = model.backend.static_attention(model.storage, max_tokens=max_tokens, max_context=model.max_context)
        if attention is None:
            raise ValueError(f"attention backend {model.backend.name} has no static attention")
        self._model = model
        self._attention = attention
        self._spare_slot = model.pool.num_blocks * model.pool.block_size
        shapes = dict.fromkeys(("tokens", "positions", "slots", "logit_rows"), (max_tokens,))
        self._inputs = StaticTensors(shapes, dtype=torch.long, device=model.device)

    def fill(self, segments: Sequence[PackedSegment], inputs: PackedInputs) -> bool:
        """Put a forward's inputs into place, padded; returns whether segments share a prefix."""
        self._inputs.wait()
        self._inputs.put("tokens", inputs.tokens)
        self._inputs.put("positions", inputs.positions)
        self._inputs.put("slots", inputs.slots, padding=self._spare_slot)
        self._inputs.put("logit_rows", inputs.logit_rows)
        self._inputs.upload()
        return self._attention.fill(segments)

    def compute(self, num_tokens: int, *, shares: bool) -> Tensor:
        """Logits [B, V] float32 of a bucket of `num_tokens` tokens: those asked for come first."""
        return self._model.compute(
            self._attention.prepare(num_tokens, shares=shares),
            tokens=self._inputs["tokens"][:num_tokens],
            positions=self._inputs["positions"][:num_tokens],
            slots=self._inputs["slots"][:num_tokens],
            logit_rows=self._inputs["logit_rows"][:num_tokens],
        )


class BucketedForward:
    """Forwards padded to buckets, computed as they come: what graphs do, on any device and without them."""

    def __init__(self, model: TransformersModel, buckets: Sequence[int] = BUCKETS) -> None:
        """`buckets` shorter than the model's shortest forward are left out."""
        self.buckets = [bucket for bucket in buckets if bucket >= model.min_tokens]
        self.forward = StaticForward(model, max(self.buckets))

    def run(self, segments: Sequence[PackedSegment], inputs: PackedInputs) -> Tensor | None:
        """Logits [rows, V] of a forward, or None if no bucket is large enough."""
        bucket = choose_bucket(len(inputs.tokens), self.buckets)
        if bucket is None:
            return None
        shares = self.forward.fill(segments, inputs)
        logits = self.replay(bucket, shares=shares)
        return logits[: len(inputs.logit_rows)].clone()  # the next replay overwrites it

    def replay(self, bucket: int, *, shares: bool) -> Tensor:
        """The logits [B, V] of what was filled in."""
        return self.forward.compute(bucket, shares=shares)


class GraphedForward(BucketedForward):
    """Padded forwards as CUDA graphs, all captured at the start, over one pool of memory."""

    def __init__(
        self,
        model: TransformersModel,
        on_progress: Progress,
        buckets: Sequence[int] = BUCKETS,
        *,
        stream: Any = None,
    ) -> None:
        """Capture, on `stream` where one is given: kernels of a graph keep its priority.

        Raises:
            InvalidArgument: MODEL_UNSUPPORTED if the model's code does what a graph cannot hold.
        """
        super().__init__(model, buckets)
        self._stream = stream or torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call, unused-ignore]
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        keys = [(bucket, shares) for bucket in reversed(self.buckets) for shares in (False, True)]
        for done, key in enumerate(keys):
            on_progress("capture graphs", done, len(keys))
            self._graphs[key] = self._capture(model, *key)
        on_progress("capture graphs", len(keys), len(keys))

    def replay(self, bucket: int, *, shares: bool) -> Tensor:
        """The logits [B, V] of what was filled in, by starting the bucket's graph."""
        graph, logits = self._graphs[bucket, shares]
        graph.replay()
        return logits

    def _capture(self, model: TransformersModel, num_tokens: int, shares: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.forward.fill([], PackedInputs())
        current = torch.cuda.current_stream(model.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                self.forward.compute(num_tokens, shares=shares)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((captured.pool() for captured, _ in self._graphs.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = self.forward.compute(num_tokens, shares=shares)
        except RuntimeError as error:
            raise InvalidArgument(
                f"{type(model.model).__name__} cannot be captured in a CUDA graph, set cuda_graphs to off: "
                f"{str(error).splitlines()[0]}",
                reason="MODEL_UNSUPPORTED",
                metadata={"field": "cuda_graphs"},
            ) from error
        return graph, logits


@torch.inference_mode()
def capture_graphs(model: TransformersModel, on_progress: Progress, stream: Any = None) -> None:
    """Give `model` its graphs; takes seconds."""
    with torch.cuda.device(model.device):
        model.graphs = GraphedForward(model, on_progress, stream=stream)


def _refused(message: str, value: str) -> InvalidArgument:
    return InvalidArgument(
        message,
        reason="CUDA_GRAPHS_UNAVAILABLE",
        metadata={"field": "cuda_graphs", "value": value, "accepted": ", ".join(get_args(CudaGraphs))},
    )
