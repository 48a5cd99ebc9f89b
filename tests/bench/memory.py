"""What two engines on neighbouring cores take from one another: memory bandwidth, alone and beside a neighbour.

    python tests/bench/memory.py --cores 0 1 --seconds 60 --json memory.json

A decoding step is little more than reading weights once. So one process on each core reads weights the way the
`streamed` format does, one row through a layer too large for any cache; the first core's speed is taken in turn with
the second core idle and reading, and with it how long a word takes from one core to the other: cores below one L3 cache
are near each other, and may have to share its way to memory. A virtual machine's cores are moved, so that all of this
can change within seconds: every trial is printed. `--awake` keeps both from sleeping, as `specpool up --keep-awake`
does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median

import torch
from torch import nn

from specpool.paths import write_atomically
from specpool_engine.modeling.cpu.linear import can_stream
from specpool_engine.modeling.cpu.linear.streamed import StreamedLinear
from specpool_tools.local.awake import cores_awake

SIZE = (1536, 151936)
"""Inputs and outputs: 467 MB."""
NEAR_NS = 100
"""Cores that answer faster are below one L3 cache."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One look at both cores."""

    latency_ns: float
    """From core to core."""
    alone: float
    """GB/s of the first core."""
    beside: float
    """The same while the second core reads."""

    @property
    def share(self) -> float:
        """Of its speed that the first core keeps."""
        return self.beside / self.alone


class Reader:
    """Reads its weights from end to end."""

    def __init__(self, core: int) -> None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        inputs, outputs = SIZE
        weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.bfloat16), requires_grad=False)
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = weight
        self._layer = StreamedLinear(linear)
        self._row = torch.zeros(1, inputs, dtype=torch.bfloat16)
        self._num_bytes = weight.numel() * weight.itemsize

    def read(self, times: int = 1) -> float:
        """GB/s."""
        started_s = time.perf_counter()
        for _ in range(times):
            self._layer.multiply(self._row)
        return times * self._num_bytes / (time.perf_counter() - started_s) / 1e9


def neighbour(core: int, ready: Event, active: Event, stop: Event) -> None:
    """Reads while it is to be active."""
    reader = Reader(core)
    ready.set()
    while not stop.is_set():
        if active.wait(0.01):
            reader.read()


def build_latency_probe(directory: Path) -> Path:
    """The program beside this file."""
    program = directory / "core_latency"
    source = Path(__file__).with_name("core_latency.cpp")
    subprocess.run(["c++", "-O2", "-std=c++17", "-pthread", str(source), "-o", str(program)], check=True)
    return program


def measure(cores: tuple[int, int], probe: Path, seconds: float, pause_s: float) -> list[Trial]:
    """Trials for as long as asked."""
    context = multiprocessing.get_context("spawn")
    ready, active, stop = context.Event(), context.Event(), context.Event()
    process = context.Process(target=neighbour, args=(cores[1], ready, active, stop), daemon=True)
    process.start()
    reader = Reader(cores[0])
    ready.wait()
    trials = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        latency = subprocess.run([str(probe), *map(str, cores)], check=True, capture_output=True, text=True).stdout
        alone = reader.read(2)
        active.set()
        reader.read()  # by then the neighbour reads, too
        beside = reader.read(2)
        active.clear()
        trial = Trial(latency_ns=float(latency), alone=alone, beside=beside)
        print(
            f"{trial.latency_ns:4.0f} ns apart: alone {alone:5.1f} GB/s, beside a neighbour {beside:5.1f} GB/s: "
            f"{trial.share:.2f}",
            flush=True,
        )
        trials.append(trial)
        time.sleep(pause_s)
    stop.set()
    process.join()
    return trials


def show(trials: Sequence[Trial]) -> None:
    """Near and far apart."""
    for name, group in (
        ("near", [t for t in trials if t.latency_ns < NEAR_NS]),
        ("far", [t for t in trials if t.latency_ns >= NEAR_NS]),
    ):
        if group:
            shares = [t.share for t in group]
            print(
                f"{len(group)} trials {name} ({median(t.latency_ns for t in group):.0f} ns): "
                f"alone {median(t.alone for t in group):.1f} GB/s, beside {median(t.beside for t in group):.1f} GB/s; "
                f"share kept: median {median(shares):.2f}, least {min(shares):.2f}, most {max(shares):.2f}"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], metavar=("FIRST", "NEIGHBOUR"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between trials")
    parser.add_argument("--awake", action="store_true", help="keep the cores awake")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(set(arguments.cores)) < 2:
        parser.error(f"--cores must be two different ones, got {arguments.cores[0]} twice")
    if not can_stream(torch.bfloat16):
        parser.exit(2, "this CPU has no AVX-512 bf16, which weights in format streamed need\n")
    with tempfile.TemporaryDirectory() as directory:
        probe = build_latency_probe(Path(directory))
        with cores_awake(arguments.cores if arguments.awake else ()):
            trials = measure(tuple(arguments.cores), probe, arguments.seconds, arguments.pause)
    show(trials)
    if arguments.json:
        document = {"cores": arguments.cores, "awake": arguments.awake, "trials": [asdict(trial) for trial in trials]}
        write_atomically(arguments.json, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
