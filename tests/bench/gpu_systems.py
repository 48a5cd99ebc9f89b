"""off, sd and ssd with the draft at several places: part of `gpu.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_steps import BLOCK_SIZE
from rich.table import Table

from specpool.client import Client
from specpool_tools.bench.report import Summary, summarize
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt

PLACES = ("colocated", "separate", "cpu")


async def run_modes(
    endpoint: str, prompts: Sequence[Prompt], max_tokens: int, lookahead: int
) -> AsyncIterator[list[Measurement]]:
    """off, sd and ssd on every prompt, after one answer of each that lets estimates settle: all so far, each time."""
    settings = [Setting(mode=mode, temperature=0.0, lookahead=lookahead) for mode in ("off", "sd", "ssd")]
    async with Client(endpoint) as client:
        for setting in settings:
            await measure(client, prompts[0], setting, max_tokens=max_tokens, seed=1)
        found = list[Measurement]()
        for prompt in prompts:
            for setting in settings:
                found.append(await measure(client, prompt, setting, max_tokens=max_tokens, seed=1))
                yield found


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What was measured with the draft at one place."""

    place: str
    devices: str
    """Of target and draft, as status has them: it says whether a shared GPU is shared by MPS."""
    num_answers: int
    """Of all modes; fewer than there are prompts and modes where the run was cut off."""
    summaries: list[Summary]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        modes = [summary.to_dict() for summary in self.summaries]
        return {"devices": self.devices, "num_answers": self.num_answers, "modes": modes}


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


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is placed."""

    target: str
    draft: str
    backend: str
    """Attention of the target, and of a draft on a GPU."""
    lookahead: int
    max_tokens: int
    draft_sm_share: float
    texts: tuple[str, ...]
    is_dry: bool
    """Both on the CPU, whatever the place."""


def run_system(pair: Pair, place: str, on_progress: Callable[[Placed], None]) -> Placed:
    """`specpool up` with the draft at `place`; everything so far is handed over after each answer."""
    up = ["--target", pair.target, "--draft", pair.draft, "--lookahead", str(pair.lookahead)]
    up += [] if pair.is_dry else place_arguments(place, pair.draft_sm_share)
    draft_backend = "sdpa" if place == "cpu" else pair.backend
    environment = {
        "SPECPOOL_TARGET_ATTENTION_BACKEND": pair.backend,
        "SPECPOOL_TARGET_BLOCK_SIZE": str(BLOCK_SIZE),
        "SPECPOOL_SPECULATOR_ATTENTION_BACKEND": draft_backend,
        "SPECPOOL_SPECULATOR_BLOCK_SIZE": str(BLOCK_SIZE if draft_backend == "flash" else 16),
    }
    with running_system(tuple(up), environment=environment) as endpoint:
        return asyncio.run(_run(endpoint, pair, place, on_progress))


async def _run(endpoint: str, pair: Pair, place: str, on_progress: Callable[[Placed], None]) -> Placed:
    devices = await device_names(endpoint)
    prompts = [Prompt(id=str(index), source="gpu", text=text) for index, text in enumerate(pair.texts)]
    placed = Placed(place=place, devices=devices, num_answers=0, summaries=[])
    async for found in run_modes(endpoint, prompts, pair.max_tokens, pair.lookahead):
        placed = Placed(place=place, devices=devices, num_answers=len(found), summaries=summarize(found))
        on_progress(placed)
    return placed


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
