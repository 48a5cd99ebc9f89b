"""What `peers.py` compares: SpecPool, transformers and llama.cpp, each started, asked and stopped in one way."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from specpool.client import Client
from specpool.errors import Internal
from specpool.native import has_compiler
from specpool_engine.modeling.cpu.linear import can_use_int4
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.requests import Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.catalogue import find_entry
from specpool_tools.models.prompts import Prompt

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

    def __init__(
        self, pair: Pair, *, name: str, ways: Mapping[str, Sequence[Options]], up: Sequence[str], precision: str
    ) -> None:
        self.name = name
        self.ways = ways
        self.precision = precision
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
        SpecPool(pair, name="SpecPool", ways=ways, up=up, precision="16 bit, draft 4 bit"),
        SpecPool(pair, name="SpecPool, all cores", ways={"off": ways["off"]}, up=shared, precision="16 bit"),
        Transformers(pair),
    ]
    if can_use_int4() and has_compiler():
        four_bits = (*up, "--weights", "int4", "--dtype", "float32")
        chosen.append(SpecPool(pair, name="SpecPool, int4", ways=ways, up=four_bits, precision="4 bit"))
        as_it_is = (*up, "--weights", "gguf", "--dtype", "float32", "--draft-weights", "gguf")
        chosen.append(SpecPool(pair, name="SpecPool, GGUF", ways=ways, up=as_it_is, precision="the file's"))
    if with_llama:
        llama_cpp.build()
        for weights, precision in (("bf16", "16 bit"), ("Q4_K_M", "4 bit"), ("file", "GGUF")):
            for with_draft in (False, True):
                chosen.append(LlamaCpp(pair, weights=weights, precision=precision, with_draft=with_draft))
    return chosen
