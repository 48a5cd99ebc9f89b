"""Everything that only a GPU can tell, on one GPU, without downloads. It has not run on one yet.

    python tests/bench/gpu.py --draft /models/draft --target /models/target --json gpu.json
    python tests/bench/gpu.py --draft /models/draft --json gpu.json     # target: the draft inflated to the shape of 8B
    python tests/bench/gpu.py --draft D --target T --json gpu.json --parts steps --backends flash
    python tests/bench/gpu.py --draft D --target T --json gpu.json --parts systems --places cpu
    python tests/bench/gpu.py --dry-run-cpu                             # the script's own flow, on tiny models

The parts, each of which may be a run of its own; results are in the file as soon as they are there, and a later run
with the same file adds to it:

- `bandwidth`: copies within the device's memory.
- `steps`: milliseconds of the target's steps with each attention backend, against the time in which the bandwidth reads
  weights and keys and values once, and how far logits are from those of `sdpa`. A backend that cannot run says why.
- `systems`: tokens per second of off, sd and ssd, with the draft on the same GPU (start `nvidia-cuda-mps-control -d`
  before, or the two take turns; the output says which), on a second GPU where there is one, and on the host's CPU.
- `vllm`: plain and with the draft model, on the same prompts, where it is installed (`--vllm-python` names another
  environment's Python).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import vllm_peer
from gpu_results import Results
from gpu_steps import VARIANTS, Comparison, Shape, Step, copy_bandwidth, inflated, step_table, tiny_model
from gpu_systems import PLACES, Pair, Placed, place_table, run_system, why_not
from rich.console import Console

from specpool.errors import InvalidArgument
from specpool_tools.bench.report import speed_table

TEXTS = (
    "Write a Python function that merges two sorted lists.",
    "Explain why the sky is blue to a ten-year-old.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Think step by step.",
    "Write a short story about a lighthouse keeper who finds a bottle with a message.",
)
PARTS = ("bandwidth", "steps", "systems", "vllm")


class Run:
    """The parts of one invocation."""

    def __init__(self, arguments: argparse.Namespace, target: str, results: Results, console: Console) -> None:
        self._arguments, self._target, self._results, self._console = arguments, target, results, console
        self._is_dry: bool = arguments.dry_run_cpu
        self._started_s = time.monotonic()

    def part(self, name: str) -> None:
        """One of `PARTS`."""
        parts: dict[str, Callable[[], None]] = {
            "bandwidth": self._bandwidth,
            "steps": self._steps,
            "systems": self._systems,
            "vllm": self._vllm,
        }
        self._say(f"part {name}")
        parts[name]()

    def _say(self, text: str) -> None:
        self._console.print(f"[{time.monotonic() - self._started_s:6.1f} s] {text}", markup=False)

    def _bandwidth(self) -> None:
        bandwidth = copy_bandwidth(_device(self._is_dry), (16 << 20) if self._is_dry else (1 << 30))
        self._results.set("copy_bytes_per_second", bandwidth)
        self._say(f"{_device_name(self._is_dry)}: copies {bandwidth / 1e9:.0f} GB/s")

    def _steps(self) -> None:
        if "copy_bytes_per_second" not in self._results.document:
            self._bandwidth()
        arguments = self._arguments
        comparison = Comparison(
            self._target,
            device=_device(self._is_dry),
            dtype="float32" if self._is_dry else arguments.dtype,
            shape=Shape(
                context=arguments.context, rows=arguments.rows, lookahead=arguments.lookahead, repeats=arguments.repeats
            ),
            bandwidth=self._results.document["copy_bytes_per_second"],
        )
        for backend in arguments.backends:
            steps, refused = comparison.run(backend)
            self._results.replace("steps", "backend", backend, map(asdict, steps))
            self._results.replace("refused", "backend", backend, map(asdict, refused))
            self._say(f"{backend}: {refused[0].reason if refused else f'{len(steps)} kinds of steps'}")
        self._console.print(step_table([Step(**step) for step in self._results.document["steps"]]))

    def _pair(self) -> tuple[str, str]:
        return ("toy#vocab=64", "toy#vocab=64,agreement=0.8") if self._is_dry else (self._target, self._arguments.draft)

    def _backend(self) -> str:
        """Attention of the systems: what was asked for, else the fastest at one token."""
        if self._is_dry or self._arguments.backend:
            return self._arguments.backend or "sdpa"
        steps = [Step(**step) for step in self._results.document["steps"] if step["step"] == "one token"]
        if not steps:
            raise InvalidArgument("no steps have been timed: give --backend, or run the part `steps` with this --json")
        return min(steps, key=lambda step: step.ms).backend.split()[0]

    def _systems(self) -> None:
        arguments, (target, draft) = self._arguments, self._pair()
        pair = Pair(
            target=target,
            draft=draft,
            backend=self._backend(),
            lookahead=arguments.lookahead,
            max_tokens=arguments.max_tokens,
            draft_sm_share=arguments.draft_sm_share,
            texts=("abcd", "hgfedcba") if self._is_dry else TEXTS,
            is_dry=self._is_dry,
        )
        self._results.set("backend", pair.backend)
        systems = list[Placed]()
        for place in arguments.places:
            if why := "" if self._is_dry else why_not(place, torch.cuda.device_count()):
                self._say(f"draft {place}: not run, {why}")
                continue
            self._say(f"draft {place}: starting")
            systems.append(run_system(pair, place, self._placed))
            self._console.print(speed_table(systems[-1].summaries))
        self._console.print(place_table(systems))

    def _placed(self, placed: Placed) -> None:
        self._results.put("systems", placed.place, placed.to_dict())
        self._say(f"draft {placed.place}: {placed.num_answers} answers, {placed.devices}")

    def _vllm(self) -> None:
        """vLLM on the same GPU, plain and with the draft model; says why where it does not run."""
        arguments, (target, draft) = self._arguments, self._pair()
        if self._is_dry or not vllm_peer.is_installed(arguments.vllm_python):
            why = "this is a dry run" if self._is_dry else f"{arguments.vllm_python} has no vllm"
            self._say(f"vllm: not run, {why}")
            return
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
                self._say(f"vllm {'with a draft model' if of else 'plain'}: {error}")
                continue
            entry = asdict(speed) | {"tokens_per_second": speed.tokens_per_second}
            self._results.replace("vllm", "name", speed.name, [entry])
            self._say(f"{speed.name}: {speed.tokens_per_second:.2f} tok/s")


def _device(is_dry: bool) -> str:
    return "cpu" if is_dry else "cuda"


def _device_name(is_dry: bool) -> str:
    return "cpu" if is_dry else torch.cuda.get_device_name()


@contextmanager
def target_folder(arguments: argparse.Namespace) -> Iterator[str]:
    """The target; one that has to be made stays in `--inflated`, if that is given."""
    needs_model = arguments.dry_run_cpu or bool({"steps", "systems", "vllm"} & set(arguments.parts))
    if arguments.target and not arguments.dry_run_cpu:
        yield arguments.target
    elif not needs_model:
        yield ""
    elif arguments.inflated and (arguments.inflated / "config.json").is_file():
        yield str(arguments.inflated)
    else:
        with tempfile.TemporaryDirectory(prefix="specpool-gpu-") as name:
            folder = arguments.inflated or Path(name) / "target"
            yield tiny_model(folder) if arguments.dry_run_cpu else inflated(arguments.draft, folder)


def parse_arguments() -> argparse.Namespace:
    """Of the command line; ends the process where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("--draft", help="folder of the draft model")
    parser.add_argument("--target", help="folder of the target model; default: the draft, inflated to the shape of 8B")
    parser.add_argument("--inflated", type=Path, metavar="FOLDER", help="keep the inflated draft there")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache while steps are timed")
    parser.add_argument("--rows", type=int, default=16, help="branches of a draft step")
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--backends", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="of the steps")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES, help="of the draft")
    parser.add_argument("--draft-sm-share", type=float, default=1.0, help="of a colocated draft; below 1 needs MPS")
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PYTHON", help="one that has vllm")
    parser.add_argument("--backend", help="of the systems; default: the fastest at one token")
    parser.add_argument("--json", type=Path, help="results, after each of them; an earlier run's are kept")
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny models on the CPU: no figure means anything")
    arguments = parser.parse_args()
    if arguments.dry_run_cpu:
        arguments.context, arguments.repeats, arguments.max_tokens = 300, 2, 16
    elif not torch.cuda.is_available():
        parser.exit(2, "gpu.py: no CUDA device is visible to torch; this measures on one GPU (or try --dry-run-cpu)\n")
    elif arguments.draft is None:
        parser.error("--draft is required: the folder of a model")
    return arguments


def identity(arguments: argparse.Namespace) -> dict[str, object]:
    """What all results of one file have in common."""
    names = ("draft", "target", "dtype", "context", "rows", "lookahead", "max_tokens", "draft_sm_share")
    return {
        "device": _device_name(arguments.dry_run_cpu),
        "torch": torch.__version__,
        "dry_run": arguments.dry_run_cpu,
        "settings": {name: getattr(arguments, name) for name in names},
    }


def main() -> None:
    """Every part that was asked for, in order."""
    arguments = parse_arguments()
    try:
        results = Results(arguments.json, identity(arguments))
        with target_folder(arguments) as target:
            run = Run(arguments, target, results, Console(width=150))
            for part in PARTS:
                if part in arguments.parts:
                    run.part(part)
    except InvalidArgument as error:
        sys.exit(f"gpu.py: {error}")


if __name__ == "__main__":
    main()
