"""Everything that only a GPU can tell, from one command, on one GPU, without downloads. It has not run on one yet.

    python tests/bench/gpu.py --draft /models/draft --target /models/target --json gpu.json
    python tests/bench/gpu.py --draft /models/draft --json gpu.json     # target: the draft inflated to the shape of 8B
    python tests/bench/gpu.py --dry-run-cpu                             # the script's own flow, on tiny models

1. Copy bandwidth of the device.
2. Steps of the target with each attention backend: milliseconds, against the time in which the bandwidth reads weights
   and keys and values once, and how far logits are from those of `sdpa`. A backend that cannot run says why.
3. Tokens per second of off, sd and ssd, with the draft on the same GPU (start `nvidia-cuda-mps-control -d` before, or
   the two take turns; the output says which), on a second GPU where there is one, and on the host's CPU.
4. vLLM, plain and with the draft model, on the same prompts, where it is installed (`--vllm-python` names another
   environment's Python).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import vllm_peer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specpool.client import Client
from specpool.errors import InvalidArgument
from specpool_engine.modeling import Segment, SequenceKV, load_model
from specpool_tools.bench.report import Summary, speed_table, summarize
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt

BLOCK_SIZE = 256
"""Of every backend, so that they can be compared: the least that flash-attn takes."""
VARIANTS = (
    {"attention_backend": "sdpa"},
    {"attention_backend": "flex"},
    {"attention_backend": "flash", "cuda_graphs": "off"},
    {"attention_backend": "flash", "cuda_graphs": "on"},
)
TEXTS = (
    "Write a Python function that merges two sorted lists.",
    "Explain why the sky is blue to a ten-year-old.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Think step by step.",
    "Write a short story about a lighthouse keeper who finds a bottle with a message.",
)
PLACES = ("colocated", "separate", "cpu")


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


def compare_backends(
    target: str, *, device: str, dtype: str, shape: Shape, bandwidth: float
) -> tuple[list[Step], list[Refused]]:
    """Time every kind of step with every backend, and compare its logits with those of `sdpa`."""
    steps, refused, expected = list[Step](), list[Refused](), dict[str, Tensor]()
    # The trunk, a block for each branch, and those of a forward that is being undone.
    num_blocks = shape.context // BLOCK_SIZE + shape.rows + 8
    for variant in VARIANTS:
        name = variant["attention_backend"] + (" with graphs" if variant.get("cuda_graphs") == "on" else "")
        settings: dict[str, Any] = {"device": device, "dtype": dtype, "block_size": BLOCK_SIZE, **variant}
        model = runs = run = None
        try:
            model = load_model(target, num_blocks=num_blocks, **settings)
            runs = Steps(model, shape)
            bound_ms = runs.bytes_read() / bandwidth * 1e3
            for kind, (num_tokens, run) in runs.kinds().items():
                logits = run().cpu()
                reference = expected.setdefault(kind, logits)
                error = (logits - reference).abs().amax(-1) / reference.abs().amax(-1)
                ms = seconds_of(run, device, shape.repeats) * 1e3
                steps.append(
                    Step(backend=name, step=kind, tokens=num_tokens, ms=ms, bound_ms=bound_ms, error=float(error.max()))
                )
        except (InvalidArgument, RuntimeError) as failure:  # the other backends, and the report, go on
            refused.append(Refused(backend=name, reason=str(failure).partition("\n")[0]))
        del model, runs, run
        gc.collect()  # captured graphs and their model refer to each other
        if device != "cpu":
            torch.cuda.empty_cache()
    return steps, refused


async def run_modes(endpoint: str, prompts: Sequence[Prompt], max_tokens: int, lookahead: int) -> list[Measurement]:
    """off, sd and ssd on every prompt, after one answer of each that lets the estimates settle."""
    settings = [Setting(mode=mode, temperature=0.0, lookahead=lookahead) for mode in ("off", "sd", "ssd")]
    async with Client(endpoint) as client:
        for setting in settings:
            await measure(client, prompts[0], setting, max_tokens=max_tokens, seed=1)
        return [
            await measure(client, prompt, setting, max_tokens=max_tokens, seed=1)
            for prompt in prompts
            for setting in settings
        ]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What was measured with the draft at one place."""

    place: str
    devices: str
    """Of target and draft, as status has them: it says whether a shared GPU is shared by MPS."""
    summaries: list[Summary]


def why_not(place: str, num_gpus: int) -> str:
    """Why a place cannot be measured here; empty if it can."""
    return f"needs two CUDA devices, and {num_gpus} is visible" if place == "separate" and num_gpus < 2 else ""


def place_arguments(place: str, draft_sm_share: float) -> list[str]:
    """Options of `specpool up` that put the draft there."""
    if place == "colocated":
        return ["--device", "cuda", "--colocated", "true", "--draft-sm-share", f"{draft_sm_share:g}"]
    if place == "separate":
        return ["--device", "cuda:0", "--draft-device", "cuda:1"]
    return ["--device", "cuda", "--draft-device", "cpu"]


def run_system(arguments: argparse.Namespace, target: str, draft: str, backend: str, place: str) -> Placed:
    """`specpool up` with the draft at `place`; a dry run has both on the CPU, whatever the place."""
    up = ["--target", target, "--draft", draft, "--lookahead", str(arguments.lookahead)]
    up += [] if arguments.dry_run_cpu else place_arguments(place, arguments.draft_sm_share)
    draft_backend = "sdpa" if place == "cpu" else backend
    environment = {
        "SPECPOOL_TARGET_ATTENTION_BACKEND": backend,
        "SPECPOOL_TARGET_BLOCK_SIZE": str(BLOCK_SIZE),
        "SPECPOOL_SPECULATOR_ATTENTION_BACKEND": draft_backend,
        "SPECPOOL_SPECULATOR_BLOCK_SIZE": str(BLOCK_SIZE if draft_backend == "flash" else 16),
    }
    texts = ("abcd", "hgfedcba") if arguments.dry_run_cpu else TEXTS
    prompts = [Prompt(id=str(index), source="gpu", text=text) for index, text in enumerate(texts)]
    with running_system(tuple(up), environment=environment) as endpoint:
        found = asyncio.run(run_modes(endpoint, prompts, arguments.max_tokens, arguments.lookahead))
        devices = asyncio.run(device_names(endpoint))
    return Placed(place=place, devices=devices, summaries=summarize(found))


async def device_names(endpoint: str) -> str:
    """Of target and draft."""
    async with Client(endpoint) as client:
        status = await client.cluster_status()
    target, draft = status.targets[0].status.model.device, status.speculators[0].status.model.device
    return f"target on {target}; draft on {draft}"


def place_table(systems: Sequence[Placed]) -> Table:
    """All places beside one another. The forward beside that of `off` shows what drafting costs the target there."""
    table = Table(title="where the draft is")
    for heading in ("draft", "mode", "tok/s", "vs off", "round, ms", "waiting, ms", "forward, ms", "hit", "late"):
        table.add_column(heading, justify="left" if heading in ("draft", "mode") else "right")
    for system in systems:
        for s in system.summaries:
            times = (f"{ms:.2f}" for ms in (s.round_ms, s.waiting_ms, s.forward_ms))
            ratio = f"{s.ratios['off']:.2f}" if "off" in s.ratios else ""
            rates = (f"{s.hit_rate:.3f}", f"{s.late_rate:.3f}") if s.setting.mode == "ssd" else ("", "")
            table.add_row(system.place, s.setting.mode, f"{s.tokens_per_second:.2f}", ratio, *times, *rates)
    return table


def run_vllm(arguments: argparse.Namespace, target: str, draft: str, console: Console) -> list[vllm_peer.Speed]:
    """vLLM on the same GPU, plain and with the draft model; says why where it does not run."""
    if arguments.dry_run_cpu or not vllm_peer.is_installed(arguments.vllm_python):
        why = "this is a dry run" if arguments.dry_run_cpu else f"{arguments.vllm_python} has no vllm"
        console.print(f"vllm: not run, {why}")
        return []
    speeds = []
    for of in (None, draft):
        request = vllm_peer.Request(
            target=target,
            draft=of,
            lookahead=arguments.lookahead,
            dtype=arguments.dtype,
            max_tokens=arguments.max_tokens,
            texts=TEXTS,
        )
        try:
            speed = vllm_peer.run(request, arguments.vllm_python)
        except RuntimeError as error:
            console.print(f"vllm {'with a draft model' if of else 'plain'}: {error}", markup=False)
            continue
        console.print(f"{speed.name}: {speed.tokens_per_second:.2f} tok/s")
        speeds.append(speed)
    return speeds


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


def parse_arguments() -> argparse.Namespace:
    """Of the command line; ends the process where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", help="folder of the draft model")
    parser.add_argument("--target", help="folder of the target model; default: the draft, inflated to the shape of 8B")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache while steps are timed")
    parser.add_argument("--rows", type=int, default=16, help="branches of a draft step")
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES, help="of the draft")
    parser.add_argument("--draft-sm-share", type=float, default=1.0, help="of a colocated draft; below 1 needs MPS")
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PYTHON", help="one that has vllm")
    parser.add_argument("--backend", help="of the systems; default: the fastest at one token")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny models on the CPU: no figure means anything")
    arguments = parser.parse_args()
    if arguments.dry_run_cpu:
        arguments.context, arguments.repeats, arguments.max_tokens = 300, 2, 16
    elif not torch.cuda.is_available():
        parser.exit(2, "gpu.py: no CUDA device is visible to torch; this measures on one GPU (or try --dry-run-cpu)\n")
    elif arguments.draft is None:
        parser.error("--draft is required: the folder of a model")
    return arguments


def main() -> None:
    arguments, console = parse_arguments(), Console(width=150)
    is_dry = arguments.dry_run_cpu
    device, dtype = ("cpu", "float32") if is_dry else ("cuda", arguments.dtype)
    shape = Shape(
        context=arguments.context, rows=arguments.rows, lookahead=arguments.lookahead, repeats=arguments.repeats
    )
    with tempfile.TemporaryDirectory(prefix="specpool-gpu-") as name:
        folder = Path(name) / "target"
        target = tiny_model(folder) if is_dry else arguments.target or inflated(arguments.draft, folder)
        bandwidth = copy_bandwidth(device, (16 << 20) if is_dry else (1 << 30))
        device_name = "cpu" if is_dry else torch.cuda.get_device_name()
        console.print(f"{device_name}: copies {bandwidth / 1e9:.0f} GB/s")
        steps, refused = compare_backends(target, device=device, dtype=dtype, shape=shape, bandwidth=bandwidth)
        console.print(step_table(steps))
        for one in refused:
            console.print(f"{one.backend}: {one.reason}")
        fastest = min((s for s in steps if s.step == "one token"), key=lambda s: s.ms).backend.split()[0]
        backend = arguments.backend or ("sdpa" if is_dry else fastest)
        pair = ("toy#vocab=64", "toy#vocab=64,agreement=0.8") if is_dry else (target, arguments.draft)
        systems = []
        for place in arguments.places:
            if why := "" if is_dry else why_not(place, torch.cuda.device_count()):
                console.print(f"draft {place}: not run, {why}")
                continue
            systems.append(run_system(arguments, *pair, backend, place))
            console.print(f"draft {place}, attention {backend}: {systems[-1].devices}")
            console.print(speed_table(systems[-1].summaries))
        console.print(place_table(systems))
        peers = run_vllm(arguments, *pair, console)
    if arguments.json:
        document = {
            "device": device_name,
            "torch": torch.__version__,
            "dry_run": is_dry,
            "settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)},
            "copy_bytes_per_second": bandwidth,
            "steps": [asdict(step) for step in steps],
            "refused": [asdict(one) for one in refused],
            "backend": backend,
            "systems": {
                system.place: {"devices": system.devices, "modes": [s.to_dict() for s in system.summaries]}
                for system in systems
            },
            "vllm": [asdict(speed) | {"tokens_per_second": speed.tokens_per_second} for speed in peers],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
