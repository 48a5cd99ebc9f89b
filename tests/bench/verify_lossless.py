"""Proves that greedy speculation changes no token: `off` against `transformers` generate, `ssd` and `sd` against `off`.

Starts the whole system (router, target, speculator) once per draft and sends real prompts over gRPC:

    python tests/bench/verify_lossless.py --num-prompts 50 --max-tokens 64

In float32 every token must be equal, and the exit status says so. In bfloat16 a forward over K+1 tokens rounds
differently from a forward over one, so near-ties can flip: the share of prompts with a difference is printed, and the
difference of the two tokens' logits at the first differing position, which must be within a few steps of bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specpool.client import Client
from specpool.v1 import inference_pb2, types_pb2
from specpool_tools.bench.requests import MODE_VALUES
from specpool_tools.bench.system import running_system
from specpool_tools.models.catalogue import resolve_model
from specpool_tools.models.prompts import load_prompts

NEAR_TIE_STEPS = 4
"""Differences of up to this many bfloat16 steps at the logit's magnitude count as near-ties."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A prompt whose tokens differ from the reference in bfloat16."""

    prompt: int
    position: int
    logit_gap: float
    bfloat16_step: float

    @property
    def near_tie(self) -> bool:
        return self.logit_gap <= NEAR_TIE_STEPS * self.bfloat16_step


class Reference:
    """The target under plain `transformers`."""

    def __init__(self, model: str, dtype: str) -> None:
        path = resolve_model(model)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        # Every prompt is to give the full number of tokens: an end token is a token like any other here.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, text: str, max_tokens: int) -> list[int]:
        inputs = self.tokenizer(text, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return output[0, inputs.input_ids.shape[1] :].tolist()

    @torch.inference_mode()
    def flip(self, prompt: int, text: str, expected: Sequence[int], actual: Sequence[int]) -> Flip:
        """How close the two tokens were where `actual` first leaves `expected`."""
        position = next(
            i for i in range(max(len(expected), len(actual))) if list(expected[: i + 1]) != list(actual[: i + 1])
        )
        prefix = self.tokenizer(text).input_ids + list(expected[:position])
        logits = self.model(torch.tensor([prefix])).logits[0, -1].float()
        pair = logits[[expected[position], actual[position]]]
        magnitude = float(logits.max().abs())
        return Flip(
            prompt=prompt,
            position=position,
            logit_gap=float((pair[0] - pair[1]).abs()),
            bfloat16_step=2.0 ** (math.floor(math.log2(magnitude)) - 7),
        )


async def complete_all(endpoint: str, texts: Sequence[str], mode: str, max_tokens: int) -> list[list[int]]:
    """The completions of all prompts, several at a time."""
    limit = asyncio.Semaphore(8)
    async with Client(endpoint) as client:

        async def complete(text: str) -> list[int]:
            request = inference_pb2.GenerateRequest(
                text=text,
                mode=MODE_VALUES[mode],
                sampling=types_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            )
            async with limit:
                return (await client.complete(request)).token_ids

        return list(await asyncio.gather(*(complete(text) for text in texts)))


def prompts(count: int) -> list[str]:
    """Real prompts, from three sources in turn."""
    by_source = [[p.text for p in load_prompts(source)] for source in ("humaneval", "gsm8k", "mtbench")]
    return [texts[i] for i in range(count) for texts in by_source][:count]


def drafts_for(target: str) -> dict[str, str]:
    """A perfect draft, a poor one, and one that knows nothing."""
    return {
        "the same model": target,
        "its first 20 layers": f"{target}#layers=20",
        "random tokens": f"random#like={target}",
    }


def system_outputs(
    target: str, draft: str, dtype: str, texts: Sequence[str], max_tokens: int, modes: Sequence[str]
) -> dict[str, list[list[int]]]:
    """Completions per mode from a system started with this draft."""
    with running_system(("--target", target, "--draft", draft, "--dtype", dtype, "--lookahead", "4")) as endpoint:
        return {mode: asyncio.run(complete_all(endpoint, texts, mode, max_tokens)) for mode in modes}


def num_equal(expected: Sequence[list[int]], actual: Sequence[list[int]]) -> int:
    return sum(e == a for e, a in zip(expected, actual, strict=True))


def verify(target: str, dtype: str, texts: Sequence[str], max_tokens: int) -> bool:
    """Run everything for one dtype and print a line per comparison. True if all is as it must be."""
    started = time.monotonic()
    reference = Reference(target, dtype)
    generated = [reference.generate(text, max_tokens) for text in texts]
    off: list[list[int]] = []
    passed = True
    for name, draft in drafts_for(target).items():
        modes = ("ssd", "sd") if off else ("off", "ssd", "sd")
        outputs = system_outputs(target, draft, dtype, texts, max_tokens, modes)
        if "off" in outputs:
            off = outputs["off"]
            passed &= report(f"{dtype} off against transformers generate", reference, dtype, texts, generated, off)
        for mode in ("ssd", "sd"):
            label = f"{dtype} {mode} against off, draft: {name}"
            passed &= report(label, reference, dtype, texts, off, outputs[mode])
    print(f"{dtype}: {time.monotonic() - started:.0f} s", flush=True)
    return passed


def report(
    label: str,
    reference: Reference,
    dtype: str,
    texts: Sequence[str],
    expected: Sequence[list[int]],
    actual: Sequence[list[int]],
) -> bool:
    equal, tokens = num_equal(expected, actual), sum(map(len, actual))
    flips = [reference.flip(i, texts[i], e, a) for i, (e, a) in enumerate(zip(expected, actual, strict=True)) if e != a]
    print(f"{label}: {equal}/{len(texts)} prompts equal ({tokens} tokens)", flush=True)
    for flip in flips:
        kind = "near-tie" if flip.near_tie else "NOT a near-tie"
        print(
            f"  prompt {flip.prompt}, token {flip.position}: logits {flip.logit_gap:.4f} apart, "
            f"one bfloat16 step is {flip.bfloat16_step:.4f}: {kind}"
        )
    return equal == len(texts) if dtype == "float32" else all(flip.near_tie for flip in flips)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    texts = prompts(arguments.num_prompts)
    results = [verify(arguments.target, dtype, texts, arguments.max_tokens) for dtype in arguments.dtypes]
    print("lossless" if all(results) else "NOT lossless")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
