"""Times of the `int4` kernel by rows: all products of one forward of a model, in turn, each with weights of its own.

    python tests/bench/int4_linear.py --rows 1 2 4 5 6 8 --threads 1

A forward of speculative decoding computes 4 to 8 rows: what counts is how little longer it takes than one row, which
takes as long as the weights take to be read. The weights are made up, which does not matter to the time. Rows take
turns, so that drift of the machine hits all alike; printed are medians.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from statistics import median

import torch
from torch import nn

from specpool_engine.modeling.cpu.huge_pages import empty_in_huge_pages
from specpool_engine.modeling.cpu.linear.int4 import Int4Linear

LAYERS = {
    "qwen2.5-1.5b": (28, {"qkv": (1536, 2048), "o": (1536, 1536), "gate_up": (1536, 17920), "down": (8960, 1536)}),
    "qwen2.5-0.5b": (24, {"qkv": (896, 1152), "o": (896, 896), "gate_up": (896, 9728), "down": (4864, 896)}),
}
"""Number of layers, and the inputs and outputs of each product in one."""
HEADS = {"qwen2.5-1.5b": (1536, 151936), "qwen2.5-0.5b": (896, 151936)}


class Product:
    """A layer and the bytes that it reads."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        self.name = name
        self.inputs = inputs
        self._layer = Int4Linear(nn.Linear(inputs, 32, bias=False))
        self._layer.out_features = outputs
        few = self._layer._weight
        self.num_bytes = len(few) * (outputs // 32)
        self._layer._weight = empty_in_huge_pages(self.num_bytes, torch.uint8)
        self._layer._weight.view(-1, len(few))[:] = few

    def milliseconds(self, x: torch.Tensor) -> float:
        started_s = time.perf_counter()
        self._layer.multiply(x)
        return (time.perf_counter() - started_s) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LAYERS, default="qwen2.5-1.5b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    num_layers, shapes = LAYERS[arguments.model]
    products = [Product(name, *shape) for _ in range(num_layers) for name, shape in shapes.items()]
    products.append(Product("head", *HEADS[arguments.model]))
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    inputs = {(rows, p.inputs): torch.randn(rows, p.inputs) for rows in arguments.rows for p in products}
    for _ in range(arguments.repeat):
        for rows in arguments.rows:
            total = dict.fromkeys((*shapes, "head", "all"), 0.0)
            for product in products:
                taken = product.milliseconds(inputs[rows, product.inputs])
                total[product.name] += taken
                total["all"] += taken
            for name, taken in total.items():
                times[rows, name].append(taken)
    num_bytes = dict.fromkeys((*shapes, "head", "all"), 0)
    for product in products:
        num_bytes[product.name] += product.num_bytes
        num_bytes["all"] += product.num_bytes
    print(
        "rows  " + "".join(f"{f'{name} {size / 1e6:.0f} MB':>18}" for name, size in num_bytes.items()) + "     of 1 row"
    )
    for rows in arguments.rows:
        taken = {name: median(times[rows, name]) for name in num_bytes}
        cells = "".join(f"{taken[name]:8.2f} ms{num_bytes[name] / taken[name] / 1e6:6.1f}/s" for name in num_bytes)
        print(f"{rows:4}  {cells}  {taken['all'] / median(times[arguments.rows[0], 'all']):11.2f}")


if __name__ == "__main__":
    main()
