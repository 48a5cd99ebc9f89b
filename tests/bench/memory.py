"""What two engines on neighbouring cores take from one another: memory bandwidth, alone and beside a neighbour.

    python tests/bench/memory.py --cores 0 1 --seconds 60 --json memory.json

A decoding step is little more than reading weights once. So one process on each core reads weights the way the
`streamed` format does, one row through a layer too large for any cache; the first core's speed is taken in turn with
the second core idle and reading. On a shared host the second figure changes within seconds: every trial is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median

import torch
from torch import nn

from specpool.cli.endpoint import write_atomically
from specpool.modeling.linear import can_stream
from specpool.modeling.linear.streamed import StreamedLinear

SIZE = (1536, 151936)
"""Inputs and outputs: 467 MB."""


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


def measure(cores: tuple[int, int], seconds: float, pause_s: float) -> list[tuple[float, float]]:
    """(alone, beside the neighbour) of the first core, in GB/s, for as long as asked."""
    context = multiprocessing.get_context("spawn")
    ready, active, stop = context.Event(), context.Event(), context.Event()
    process = context.Process(target=neighbour, args=(cores[1], ready, active, stop), daemon=True)
    process.start()
    reader = Reader(cores[0])
    ready.wait()
    trials = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        alone = reader.read(2)
        active.set()
        reader.read()  # by then the neighbour reads, too
        beside = reader.read(2)
        active.clear()
        trials.append((alone, beside))
        print(f"alone {alone:5.1f} GB/s, beside a neighbour {beside:5.1f} GB/s: {beside / alone:.2f}", flush=True)
        time.sleep(pause_s)
    stop.set()
    process.join()
    return trials


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], metavar=("FIRST", "NEIGHBOUR"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between trials")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not can_stream(torch.bfloat16):
        parser.exit(2, "this CPU has no AVX-512 bf16, which weights in format streamed need\n")
    trials = measure(tuple(arguments.cores), arguments.seconds, arguments.pause)
    shares = sorted(beside / alone for alone, beside in trials)
    alone, beside = (median(speeds) for speeds in zip(*trials, strict=True))
    print(
        f"{len(trials)} trials: alone {alone:.1f} GB/s, beside {beside:.1f} GB/s; "
        f"share kept: median {median(shares):.2f}, least {shares[0]:.2f}, most {shares[-1]:.2f}"
    )
    if arguments.json:
        document = {"cores": arguments.cores, "trials": [{"alone": a, "beside": b} for a, b in trials]}
        write_atomically(str(arguments.json), json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
