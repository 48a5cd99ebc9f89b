"""What a target's text loses by weights of fewer bits, ours and llama.cpp's, over the same tokens.

    python tests/bench/weight_quality.py --json bench-results/weight_quality.json

The text is the beginning of two files of Python's standard library and two of this repository, code and prose of each.
It is cut into chunks of `--context` tokens, as llama-perplexity does; the second half of each is scored. Every row of
the table is compared with one reference, the model's own 16-bit weights computed in float32:

    perplexity   exp of the mean negative log-probability of the text's tokens
    same first   share of the places where the most likely token is the reference's
    KL           mean over the places of sum p log(p / q), p the reference's probabilities, q the row's, in nats

llama.cpp's rows are of files that its converter and quantizer made of the very weights that ours were made of; `--gguf`
adds files as they are. Its log-probabilities come in steps of 0.00025, cut off 16 below the likeliest.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

import llama_cpp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.tokenizer import load_tokenizer
from specpool_tools.models.catalogue import find_entry, resolve_model

ROOT = Path(__file__).parents[2]
REFERENCE = "plain:float32"
OURS = ("plain:bfloat16", "int8:float32", "int4:float32")
"""Weights and data type between layers, each as `specpool up` would have it."""
THEIRS = ("bf16", "Q8_0", "Q4_K_M", "Q4_0")
_MAGIC = b"_logits_"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one way to compute a model, against the reference; see the head of this file."""

    perplexity: float
    same_first: float
    divergence: float
    divergence_error: float
    """Standard error of the mean divergence."""


def quality(scores: Iterator[Tensor], reference: Sequence[Tensor], following: Sequence[Tensor]) -> Quality:
    """From log-probabilities [places, V] of each chunk, the reference's, and the tokens [places] that follow."""
    lost: list[float] = []
    same: list[bool] = []
    divergences: list[float] = []
    for ours, theirs, tokens in zip(scores, reference, following, strict=True):
        lost += (-ours.gather(1, tokens[:, None])[:, 0]).tolist()
        same += ours.argmax(dim=1).eq(theirs.argmax(dim=1)).tolist()
        divergences += torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).tolist()
    return Quality(
        perplexity=math.exp(statistics.fmean(lost)),
        same_first=statistics.fmean(same),
        divergence=statistics.fmean(divergences),
        divergence_error=statistics.stdev(divergences) / math.sqrt(len(divergences)),
    )


def text(characters: int) -> str:
    """As many characters of each of four sources."""
    parts = (
        inspect.getsource(statistics),
        topics["types"] + topics["specialnames"],
        (ROOT / "services/core/specpool/algorithm/round.py").read_text()
        + (ROOT / "services/engine/specpool_engine/modeling/paged_kv.py").read_text(),
        (ROOT / "ARCHITECTURE.md").read_text(),
    )
    return "\n".join(part[:characters] for part in parts)


def scored(chunk: Sequence[int]) -> int:
    """Index of the first token of a chunk after which there is a scored place, as in llama-perplexity."""
    return len(chunk) // 2


def our_scores(model_name: str, weights: str, dtype: str, chunks: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Log-probabilities [places, V] of each chunk, computed as a target computes them."""
    context = len(chunks[0])
    model = load_model(resolve_model(model_name), dtype=dtype, weights=weights, num_blocks=context // 16 + 1)
    for chunk in chunks:
        kv = SequenceKV(model.pool)
        segment = Segment(kv=kv, tokens=chunk[:-1], num_logits=context - 1 - scored(chunk))
        yield model.forward([segment]).log_softmax(dim=-1)
        kv.free()


def read_scores(path: Path, chunks: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Log-probabilities [places, V] of each chunk from a file of llama-perplexity; ValueError if it is of other tokens.

    The file: eight letters, context, vocabulary and number of chunks in 32 bits each, all tokens, then for every scored
    place two floats, step and least log-probability, and a 16-bit number of steps for every token, filled up to an even
    number of tokens.
    """
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
        context, num_tokens, num_chunks = np.fromfile(file, "<i4", 3).tolist()
        tokens = np.fromfile(file, "<i4", context * num_chunks).reshape(num_chunks, context)
        if magic != _MAGIC or tokens.tolist() != [list(chunk) for chunk in chunks]:
            raise ValueError(f"{path} holds scores of other tokens")
        width = 2 * ((num_tokens + 1) // 2)
        place = np.dtype([("step", "<f4"), ("least", "<f4"), ("steps", "<u2", width)])
        for chunk in chunks:
            rows = np.fromfile(file, place, context - 1 - scored(chunk))
            steps = torch.from_numpy(rows["steps"][:, :num_tokens].astype(np.float32))
            step, least = (torch.from_numpy(rows[name].copy())[:, None] for name in ("step", "least"))
            yield steps * step + least


def their_scores(
    gguf: Path, words: str, chunks: Sequence[Sequence[int]], vocabulary: int, threads: int
) -> Iterator[Tensor]:
    """Log-probabilities [places, `vocabulary`] of each chunk by llama.cpp."""
    with tempfile.TemporaryDirectory(prefix="specpool-quality-") as folder:
        source, scores = Path(folder) / "text", Path(folder) / "scores"
        source.write_text(words)
        llama_cpp.save_scores(gguf, source, scores, context=len(chunks[0]), num_chunks=len(chunks), num_threads=threads)
        for chunk in read_scores(scores, chunks):
            yield chunk[:, :vocabulary]


def measure(arguments: argparse.Namespace, console: Console) -> tuple[dict[str, Quality], dict[str, object]]:
    """Every row, and what was measured."""
    tokenizer = load_tokenizer(resolve_model(arguments.model))
    words = text(arguments.characters)
    ids = tokenizer(words, add_special_tokens=False).input_ids
    chunks = [ids[i : i + arguments.context] for i in range(0, len(ids) - arguments.context + 1, arguments.context)]
    following = [torch.tensor(chunk[scored(chunk) + 1 :]) for chunk in chunks]
    console.print(f"{len(ids)} tokens, {len(chunks)} chunks, {sum(map(len, following))} places scored", highlight=False)
    reference = list(our_scores(arguments.model, *REFERENCE.split(":"), chunks))
    vocabulary = reference[0].shape[1]
    rows: dict[str, Quality] = {}

    def add(name: str, scores: Iterator[Tensor]) -> None:
        rows[name] = quality(scores, reference, following)
        console.print(f"{name}: {rows[name]}", highlight=False)

    add(f"SpecPool, {REFERENCE}", iter(reference))
    for name in arguments.ours:
        weights, dtype = name.split(":")
        add(f"SpecPool, {name}", our_scores(arguments.model, weights, dtype, chunks))
    if not arguments.no_llama:
        llama_cpp.build()
        files = {name: llama_cpp.convert(arguments.model, name) for name in arguments.theirs}
        for name, gguf in {**files, **{path.name: path for path in arguments.gguf}}.items():
            add(f"llama.cpp, {name}", their_scores(gguf, words, chunks, vocabulary, arguments.threads))
    origin = find_entry(arguments.model).directory / "specpool-origin.json"
    about = {
        "model": arguments.model,
        "origin": json.loads(origin.read_text()) if origin.is_file() else None,
        "context": arguments.context,
        "num_chunks": len(chunks),
        "num_scored": sum(map(len, following)),
        "sha256_of_tokens": hashlib.sha256(json.dumps(chunks).encode()).hexdigest(),
        "python": platform.python_version(),
    }
    return rows, about


def show(rows: dict[str, Quality], console: Console) -> None:
    """One line per way to compute the model."""
    table = Table(title="against the 16-bit weights computed in float32")
    for heading in ("weights", "perplexity", "same first", "KL"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, row in rows.items():
        divergence = f"{row.divergence:.5f} ± {row.divergence_error:.5f}"
        table.add_row(name, f"{row.perplexity:.4f}", f"{row.same_first:.4f}", divergence)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct", help="of the catalogue, fetched")
    parser.add_argument("--characters", type=int, default=7000, help="of each of the four parts of the text")
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="WEIGHTS:DTYPE")
    parser.add_argument("--theirs", nargs="*", default=THEIRS, help="bf16, or formats of llama-quantize")
    parser.add_argument(
        "--gguf", nargs="*", default=[], type=Path, help="files of the same model, for llama.cpp as they are"
    )
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp, which has to be built")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    rows, about = measure(arguments, console)
    show(rows, console)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = {**about, "rows": {name: asdict(row) for name, row in rows.items()}}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
