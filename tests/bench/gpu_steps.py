"""Steps of the target on a GPU with each attention backend: part of `gpu.py`."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV

Result = TypeVar("Result")
BLOCK_SIZE = 256
"""Of every backend, so that they can be compared: the least that flash-attn takes."""
REFERENCE = "sdpa"
VARIANTS: dict[str, dict[str, str]] = {
    "sdpa": {"attention_backend": "sdpa"},
    "flex": {"attention_backend": "flex"},
    "flash": {"attention_backend": "flash", "cuda_graphs": "off"},
    "flash with graphs": {"attention_backend": "flash", "cuda_graphs": "on"},
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of forward with one backend."""

    backend: str
    step: str
    tokens: int
    ms: float
    bound_ms: float
    """In which the bandwidth reads the bytes that the step must read, once."""
    error: float
    """Largest difference of logits from those of `sdpa`, over the largest logit of the row."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A backend that cannot run here."""

    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much is measured."""

    context: int
    rows: int
    lookahead: int
    repeats: int


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for index in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if index >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: destination.copy_(source), device, 10)


@contextmanager
def branches(trunk: SequenceKV, count: int) -> Iterator[list[SequenceKV]]:
    """Forks of `trunk`, freed afterwards."""
    forks = [trunk.fork() for _ in range(count)]
    yield forks
    for fork in forks:
        fork.free()


class Steps:
    """The forwards that a target and a speculator run, on one model."""

    def __init__(self, model: Any, shape: Shape) -> None:
        self.model = model
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(model.vocab_size, (shape.context,), generator=generator).tolist()
        self._trunk = SequenceKV(model.pool)
        for start in range(0, shape.context, 512):
            model.forward([Segment(kv=self._trunk, tokens=self._tokens[start : start + 512], num_logits=0)])

    def kinds(self) -> dict[str, tuple[int, Callable[[], Tensor]]]:
        """By name: number of tokens, and the forward, which leaves everything as it was."""
        num_verified = self.shape.lookahead + 1
        return {
            "one token": (1, lambda: self._append(1)),
            f"verify K={self.shape.lookahead}": (num_verified, lambda: self._append(num_verified)),
            f"{self.shape.rows} branches": (self.shape.rows, self._branch),
        }

    def bytes_read(self) -> int:
        """Weights but embeddings, and keys and values of the context once."""
        module, storage = self.model.model, self.model.storage
        embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        weights = {parameter.data_ptr(): parameter for parameter in module.parameters()}
        if embedding.data_ptr() != head.data_ptr():
            del weights[embedding.data_ptr()]
        num_weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in weights.values())
        slot_bytes = 2 * storage.keys[:, 0, 0].numel() * storage.keys.element_size()
        return num_weight_bytes + slot_bytes * self.shape.context

    def _append(self, num_tokens: int) -> Tensor:
        segment = Segment(kv=self._trunk, tokens=self._tokens[:num_tokens], num_logits=num_tokens)
        logits: Tensor = self.model.forward([segment])
        self._trunk.truncate(self.shape.context)
        return logits

    def _branch(self) -> Tensor:
        with branches(self._trunk, self.shape.rows) as forks:
            logits: Tensor = self.model.forward(
                [Segment(kv=kv, tokens=[self._tokens[index]]) for index, kv in enumerate(forks)]
            )
        return logits


def _logits(runs: Steps) -> dict[str, Tensor]:
    return {kind: run().cpu() for kind, (_, run) in runs.kinds().items()}


class Comparison:
    """Times every kind of step with one backend after another, and compares its logits with those of `sdpa`."""

    def __init__(self, target: str, *, device: str, dtype: str, shape: Shape, bandwidth: float) -> None:
        self._target, self._device, self._dtype, self._shape, self._bandwidth = target, device, dtype, shape, bandwidth
        self._expected: dict[str, Tensor] = {}

    def run(self, backend: str) -> tuple[list[Step], list[Refused]]:
        """Steps of a backend, or why there are none."""
        try:
            if backend != REFERENCE and not self._expected:
                self._expected = self._on_model(REFERENCE, _logits)
            return self._on_model(backend, partial(self._steps, backend)), []
        except (InvalidArgument, RuntimeError) as failure:  # the other backends, and the report, go on
            return [], [Refused(backend=backend, reason=str(failure).partition("\n")[0])]

    def _on_model(self, backend: str, use: Callable[[Steps], Result]) -> Result:
        gc.collect()  # of the model before this one: captured graphs and their model refer to each other
        if self._device != "cpu":
            torch.cuda.empty_cache()
        # The trunk, a block for each branch, and those of a forward that is being undone.
        num_blocks = self._shape.context // BLOCK_SIZE + self._shape.rows + 8
        settings: dict[str, Any] = {"device": self._device, "dtype": self._dtype, "block_size": BLOCK_SIZE}
        model = load_model(self._target, num_blocks=num_blocks, **settings, **VARIANTS[backend])
        return use(Steps(model, self._shape))

    def _steps(self, backend: str, runs: Steps) -> list[Step]:
        steps = list[Step]()
        bound_ms = runs.bytes_read() / self._bandwidth * 1e3
        if backend == REFERENCE:
            self._expected = _logits(runs)
        for kind, (num_tokens, run) in runs.kinds().items():
            reference = self._expected[kind]
            error = (run().cpu() - reference).abs().amax(-1) / reference.abs().amax(-1)
            ms = seconds_of(run, self._device, self._shape.repeats) * 1e3
            steps.append(
                Step(backend=backend, step=kind, tokens=num_tokens, ms=ms, bound_ms=bound_ms, error=float(error.max()))
            )
        return steps


def step_table(steps: Sequence[Step]) -> Table:
    """One row per backend and kind of step."""
    table = Table(title="steps of the target")
    for heading in ("backend", "step", "tokens", "ms", "bytes / bandwidth, ms", "share of bandwidth", "logits' error"):
        table.add_column(heading, justify="left" if heading in ("backend", "step") else "right")
    for s in steps:
        shares = (f"{s.ms:.3f}", f"{s.bound_ms:.3f}", f"{s.bound_ms / s.ms:.0%}", f"{s.error:.4f}")
        table.add_row(s.backend, s.step, str(s.tokens), *shares)
    return table


def inflated(draft: str, folder: Path) -> str:
    """The draft in the shape of an 8B model, computing the same."""
    script = Path(__file__).with_name("inflate.py")
    subprocess.run([sys.executable, str(script), draft, str(folder), "--like", "8b"], check=True)
    return str(folder)


def tiny_model(folder: Path) -> str:
    """Random weights, for the flow of this script."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
