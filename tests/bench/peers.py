"""SpecPool beside what a user would otherwise run, on the same pair, prompts, cores and token counts, in one run.

    python tests/bench/peers.py --json peers.json

Peers: `transformers` (generate, assisted generation) and llama.cpp (plain, with the draft model) with 16-bit weights;
llama.cpp with 4-bit weights stands in the same table, labelled: another precision, so another model. Every setting that
a peer leaves open is chosen for each temperature on other prompts, as our K is. All have the same cores: SpecPool puts
the target on one half and the speculator on the other, the others use all of them for both models, as does SpecPool's
`off` in the layout "all cores".

In a virtual machine all cores are kept awake (`specpool up --keep-awake`), for whatever runs.

The prompts are gone through in passes. In each pass every system is started, answers its part of the prompts under all
its settings in turn, and is stopped: no two are ever in memory, and drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from specpool.client import Client
from specpool.errors import Internal
from specpool_tools.bench.machine import recommended_arguments, should_keep_awake
from specpool_tools.bench.requests import Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.local.awake import cores_awake
from specpool_tools.models.catalogue import find_entry
from specpool_tools.models.prompts import Prompt, load_prompts

SOURCES = ("humaneval", "gsm8k", "mtbench")
CONTEXT = 2048
_WARM_UP = Prompt(source="", id="", text="Hello")
Options = Mapping[str, Any]
"""Settings of one way of generating, such as K."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt answered."""

    token_ids: tuple[int, ...]
    num_timed: int
    """Tokens after the first moment that counts."""
    seconds: float
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """An answer and where it is from."""

    system: str
    way: str
    precision: str
    temperature: float
    options: dict[str, Any]
    prompt_id: str
    answer: Answer


Generate = Callable[[str, Options, Prompt, float, int], Answer]
"""(way, options, prompt, temperature, tokens at most) -> answer."""


class System(ABC):
    """Something that generates, in one or several ways."""

    name: str
    precision: str = "16 bit"
    ways: Mapping[str, Sequence[Options]]
    """Way of generating -> settings to choose from."""

    @abstractmethod
    def running(self) -> AbstractContextManager[Generate]:
        """Started, and stopped on leaving."""


class SpecPool(System):
    """Ours."""

    def __init__(self, pair: Pair, *, name: str, ways: Mapping[str, Sequence[Options]], up: Sequence[str]) -> None:
        self.name = name
        self.ways = ways
        self.precision = "16 bit, draft 4 bit" if set(ways) != {"off"} else "16 bit"
        self._up = (*recommended_arguments(), "--target", pair.target, "--draft", pair.draft, *up)

    @contextmanager
    def running(self) -> Iterator[Generate]:
        with running_system(self._up) as endpoint, asyncio.Runner() as runner:

            async def generate(setting: Setting, prompt: Prompt, max_tokens: int) -> Answer:
                async with Client(endpoint) as client:
                    m = await measure(client, prompt, setting, max_tokens=max_tokens, seed=1)
                return Answer(token_ids=m.token_ids, num_timed=m.decode_tokens, seconds=m.decode_seconds)

            yield lambda way, options, prompt, temperature, max_tokens: runner.run(
                generate(Setting(mode=way, temperature=temperature, **options), prompt, max_tokens)
            )


class Transformers(System):
    """`generate`, with and without an assistant model, on all cores."""

    name = "transformers"
    ways: Mapping[str, Sequence[Options]] = {
        "generate": [{}],
        "assisted": [
            {"num_assistant_tokens": 2, "confidence": 0.0},
            {"num_assistant_tokens": 4, "confidence": 0.0},
            {"num_assistant_tokens": 6, "confidence": 0.4},
        ],
    }

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    @contextmanager
    def running(self) -> Iterator[Generate]:
        torch.set_num_threads(num_cores())
        target, draft = (
            AutoModelForCausalLM.from_pretrained(find_entry(name).directory, dtype=torch.bfloat16).eval()
            for name in (self._pair.target, self._pair.draft)
        )

        def generate(way: str, options: Options, prompt: Prompt, temperature: float, max_tokens: int) -> Answer:
            if way == "assisted":
                draft.generation_config.num_assistant_tokens = options["num_assistant_tokens"]
                draft.generation_config.num_assistant_tokens_schedule = "constant"
                draft.generation_config.assistant_confidence_threshold = options["confidence"]
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            clock = _Clock()
            torch.manual_seed(1)
            ids = torch.tensor([self._pair.encode(prompt)])
            output = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                assistant_model=draft if way == "assisted" else None,
                repetition_penalty=1.0,
                streamer=clock,
                **(
                    sampling if temperature else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
                ),
            )
            return clock.answer(output[0, ids.shape[1] :].tolist())

        yield generate


class _Clock(BaseStreamer):
    """Times the tokens: `put` gets the prompt first, then what each step commits."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self._steps.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass

    def answer(self, token_ids: list[int]) -> Answer:
        (start, first), (end, _) = self._steps[1], self._steps[-1]
        return Answer(token_ids=tuple(token_ids), num_timed=len(token_ids) - first, seconds=end - start)


class LlamaCpp(System):
    """llama-server, plain or with the draft model, on all cores."""

    def __init__(self, pair: Pair, *, weights: str, precision: str, with_draft: bool) -> None:
        self.name = f"llama.cpp {precision}"
        self.precision = precision
        lookaheads = [{"n_max": n, "p_min": p} for n in (2, 4, 8) for p in (0.0, 0.75)]
        self.ways = {"draft model": lookaheads} if with_draft else {"plain": [{}]}
        self._pair = pair
        self._weights = weights
        self._with_draft = with_draft

    @contextmanager
    def running(self) -> Iterator[Generate]:
        """The server takes its settings when it starts: it is restarted whenever others are asked for."""
        with ExitStack() as stack:
            current: list[tuple[Options, llama_cpp.LlamaServer]] = []

            def server(options: Options) -> llama_cpp.LlamaServer:
                if not current or current[0][0] != options:
                    stack.close()
                    current[:] = [(options, stack.enter_context(self._server(options)))]
                    self._complete(current[0][1], self._pair.encode(_WARM_UP), 0.0, 4)
                return current[0][1]

            yield lambda way, options, prompt, temperature, max_tokens: self._complete(
                server(options), self._pair.encode(prompt), temperature, max_tokens
            )

    def _server(self, options: Options) -> AbstractContextManager[llama_cpp.LlamaServer]:
        target = llama_cpp.convert(self._pair.target, self._weights)
        draft = llama_cpp.convert(self._pair.draft, self._weights) if self._with_draft else None
        return llama_cpp.running_server(target, draft, num_threads=num_cores(), context=CONTEXT, **options)

    def _complete(
        self, server: llama_cpp.LlamaServer, prompt: Sequence[int], temperature: float, max_tokens: int
    ) -> Answer:
        token_ids, timings = server.complete(
            prompt,
            n_predict=max_tokens,
            temperature=temperature,
            samplers=["temperature"],
            repeat_penalty=1.0,
            seed=1,
        )
        if self._with_draft and max_tokens > 16 and not timings.get("draft_n"):
            raise Internal("llama-server drafted nothing: it was asked for speculative decoding")
        # Their count starts with the token that the prompt gave, and their clock after it.
        return Answer(
            token_ids=tuple(token_ids),
            num_timed=int(timings["predicted_n"]) - 1,
            seconds=timings["predicted_ms"] / 1000,
        )


class Pair:
    """The two models, and prompts as the target's tokens."""

    def __init__(self, target: str, draft: str) -> None:
        self.target = target
        self.draft = draft
        self._tokenizer: Any = AutoTokenizer.from_pretrained(find_entry(target).directory)

    def encode(self, prompt: Prompt) -> list[int]:
        """With the chat template, as our target does it."""
        messages = [{"role": "user", "content": prompt.text}]
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def systems(pair: Pair, lookaheads: Sequence[int], up: Sequence[str], *, with_llama: bool) -> list[System]:
    """Everything to compare."""
    candidates = [{"lookahead": lookahead} for lookahead in lookaheads]
    ways = {"off": [{"lookahead": max(lookaheads)}], "sd": candidates, "ssd": candidates}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    shared = (*up, "--affinity", f"target={cores};speculator={cores}")
    chosen: list[System] = [
        SpecPool(pair, name="SpecPool", ways=ways, up=up),
        SpecPool(pair, name="SpecPool, all cores", ways={"off": ways["off"]}, up=shared),
        Transformers(pair),
    ]
    if with_llama:
        llama_cpp.build()
        for weights, precision in (("bf16", "16 bit"), ("Q4_K_M", "4 bit")):
            for with_draft in (False, True):
                chosen.append(LlamaCpp(pair, weights=weights, precision=precision, with_draft=with_draft))
    return chosen


Key = tuple[str, str, float]
"""(system, way, temperature)."""


class Comparison:
    """All answers of a run, and the settings that were chosen on the way."""

    def __init__(self, temperatures: Sequence[float], max_tokens: int, console: Console) -> None:
        self.results: list[Result] = []
        self._temperatures = temperatures
        self._max_tokens = max_tokens
        self._console = console
        self._chosen: dict[Key, Options] = {}

    def run(self, system: System, tuning: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
        """Start the system, let it answer `prompts` in all its ways, stop it."""
        with system.running() as generate:
            for way, candidates in system.ways.items():
                generate(way, candidates[0], tuning[0], self._temperatures[0], 16)  # warm-up
                for temperature in self._temperatures:
                    if (system.name, way, temperature) not in self._chosen:
                        self._choose(system, generate, way, temperature, tuning)
            for index, prompt in enumerate(prompts):
                keys = [(way, temperature) for temperature in self._temperatures for way in system.ways]
                turn = index % len(keys)
                for way, temperature in [*keys[turn:], *keys[:turn]]:
                    options = self._chosen[system.name, way, temperature]
                    answer = generate(way, options, prompt, temperature, self._max_tokens)
                    self.results.append(_result(system, way, temperature, options, prompt, answer))
        del generate
        gc.collect()  # the models of a peer in this process

    def _choose(
        self, system: System, generate: Generate, way: str, temperature: float, tuning: Sequence[Prompt]
    ) -> None:
        candidates = system.ways[way]
        speeds = [0.0]
        if len(candidates) > 1:
            runs = [[generate(way, o, prompt, temperature, 32) for o in candidates] for prompt in tuning]
            speeds = [speed(answers) for answers in zip(*runs, strict=True)]
            shown = ", ".join(f"{dict(o)}: {s:.2f}" for o, s in zip(candidates, speeds, strict=True))
            self._console.print(f"{system.name}, {way}, T={temperature:g}: tokens/s {shown}", highlight=False)
        self._chosen[system.name, way, temperature] = candidates[speeds.index(max(speeds))]


def _result(system: System, way: str, temperature: float, options: Options, prompt: Prompt, answer: Answer) -> Result:
    return Result(
        system=system.name,
        way=way,
        precision=system.precision,
        temperature=temperature,
        options=dict(options),
        prompt_id=prompt.id,
        answer=answer,
    )


def speed(answers: Sequence[Answer]) -> float:
    """Tokens per second after the first token."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.num_timed for answer in answers) / seconds if seconds else 0.0


def show(results: Sequence[Result], console: Console) -> None:
    """One row per way of generating, and what `ssd` is relative to it."""
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.system, result.way, result.temperature].append(result)
    speeds = {key: speed([r.answer for r in group]) for key, group in groups.items()}
    table = Table(title="tokens/s after the first token; SpecPool's ssd relative to each")
    for heading in ("T", "system", "way", "precision", "settings", "tok/s", "ssd / this", "tokens", "= off"):
        table.add_column(heading, justify="right" if heading in ("T", "tok/s", "ssd / this", "tokens") else "left")
    for key in sorted(groups, key=lambda key: key[2]):
        (system, way, temperature), group = key, groups[key]
        reference = {r.prompt_id: r.answer.token_ids for r in groups.get(("SpecPool", "off", temperature), [])}
        same = sum(r.answer.token_ids == reference.get(r.prompt_id) for r in group) / len(group)
        table.add_row(
            f"{temperature:g}",
            system,
            way,
            group[0].precision,
            ", ".join(f"{name}={value}" for name, value in group[0].options.items()),
            f"{speeds[key]:.2f}",
            f"{ours / speeds[key]:.2f}" if (ours := speeds.get(("SpecPool", "ssd", temperature))) else "",
            str(sum(len(r.answer.token_ids) for r in group)),
            f"{same:.2f}" if reference else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--lookaheads", type=int, nargs="+", default=[4, 5], help="candidates for our K")
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--num-tuning-prompts", type=int, default=3)
    parser.add_argument("--num-passes", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=[], help="systems; default: all", metavar="NAME[, WAY]")
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp, which has to be built")
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)
    by_source = [load_prompts(source) for source in SOURCES]
    in_turn = [prompts[i] for i in range(min(map(len, by_source))) for prompts in by_source]
    tuning = in_turn[: arguments.num_tuning_prompts]
    prompts = in_turn[arguments.num_tuning_prompts :][: arguments.num_prompts]
    pair = Pair(arguments.target, arguments.draft)
    comparison = Comparison(arguments.temperatures, arguments.max_tokens, console)
    compared = systems(pair, arguments.lookaheads, arguments.up, with_llama=not arguments.no_llama)
    if arguments.only:
        compared = [s for s in compared if {s.name, *(f"{s.name}, {way}" for way in s.ways)} & set(arguments.only)]
    with cores_awake(sorted(os.sched_getaffinity(0)) if should_keep_awake() else ()):
        for index in range(arguments.num_passes):
            for system in compared if index % 2 == 0 else reversed(compared):
                console.print(f"pass {index + 1}: {system.name}, {', '.join(system.ways)}", highlight=False)
                comparison.run(system, tuning, prompts[index :: arguments.num_passes])
    show(comparison.results, console)
    if arguments.json:
        rows = ",\n".join(json.dumps(asdict(result)) for result in comparison.results)
        arguments.json.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
