"""How good a draft is for a target: what `specpool plan` wants to know of a pair, measured without a pool.

    python tests/bench/draft_quality.py --target qwen2.5-coder-1.5b-instruct --draft qwen2.5-coder-0.5b-instruct

The target answers the prompts of `specpool bench` greedily, all at once; at every token of its answers, end tokens
included, the draft ranks what comes next. Both compute in float32.

Printed are the keys of a profile: `acceptance`, the share of the target's tokens that the draft has first;
`confidence_spread`, how unequal its probabilities of its first tokens are, calibrated as a running speculator does;
`miss_constant` and `miss_exponent`, of the law by which the other tokens are among its next ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from specpool.algorithm.calibration import RankCalibration
from specpool.algorithm.estimators import MissPowerLawEstimator
from specpool_engine.modeling.files import resolve_model_directory
from specpool_tools.bench.main import choose_prompts
from specpool_tools.bench.options import BenchOptions
from specpool_tools.models.catalogue import resolve_model

NUM_RANKS = 33
"""Looked at: the first, and as many others as a round could guess."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a draft; see `Profile`."""

    acceptance: float
    confidence_spread: float
    miss_constant: float
    miss_exponent: float


def quality(scores: Sequence[Sequence[float]], ranks: Sequence[int | None]) -> Quality:
    """From each token's ranked log-probabilities, best first, and the rank of the target's token, None beyond them."""
    calibration = RankCalibration(decay=1.0)
    for row, rank in zip(scores, ranks, strict=True):
        calibration.observe(row, rank)
    confidences = [calibration.probabilities(row)[0] for row in scores]
    mean = sum(confidences) / len(confidences)
    variance = sum((confidence - mean) ** 2 for confidence in confidences) / len(confidences)
    law = MissPowerLawEstimator(decay=1.0)
    for rank in ranks:
        if rank != 0:
            law.observe(None if rank is None else rank - 1, NUM_RANKS - 1)
    return Quality(
        acceptance=sum(rank == 0 for rank in ranks) / len(ranks),
        confidence_spread=variance / (mean * (1 - mean)),
        miss_constant=law.value.constant,
        miss_exponent=law.value.exponent,
    )


def directory(reference: str) -> Path:
    """Of a model of the hub, of the catalogue, or a directory already."""
    return resolve_model_directory(resolve_model(reference))


def load(reference: str) -> Any:
    """In float32."""
    return AutoModelForCausalLM.from_pretrained(directory(reference), dtype=torch.float32).eval()


def answers(arguments: argparse.Namespace) -> list[tuple[Tensor, int]]:
    """Tokens of every prompt with the target's answer, and how many of them are the prompt's."""
    options = BenchOptions(target=arguments.target, draft=arguments.draft, num_prompts=arguments.num_prompts)
    _, prompts = choose_prompts(options)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory(arguments.target), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    model = load(arguments.target)
    tokens = model.generate(**batch, max_new_tokens=arguments.max_tokens, do_sample=False, repetition_penalty=1.0)
    padding = (batch.attention_mask == 0).sum(dim=1).tolist()
    end_tokens = model.generation_config.eos_token_id
    if end_tokens is None:
        end_tokens = tokenizer.eos_token_id
    texts = []
    for row, num_padding, mask in zip(tokens, padding, batch.attention_mask, strict=True):
        answer = row[len(mask) :]
        ends = torch.isin(answer, torch.tensor(end_tokens)).nonzero()
        length = len(answer) if len(ends) == 0 else int(ends[0]) + 1
        texts.append((row[num_padding : len(mask) + length], len(mask) - num_padding))
    return texts


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> Quality:
    """Both models, one after the other."""
    scores: list[list[float]] = []
    ranks: list[int | None] = []
    texts = answers(arguments)
    draft = load(arguments.draft)
    for tokens, num_prompt_tokens in texts:
        logits = draft(tokens[None]).logits[0, num_prompt_tokens - 1 : -1]
        best = logits.log_softmax(dim=-1).topk(NUM_RANKS)
        scores += best.values.tolist()
        for row, token in zip(best.indices.tolist(), tokens[num_prompt_tokens:].tolist(), strict=True):
            ranks.append(row.index(token) if token in row else None)
    return quality(scores, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(asdict(measure(arguments)), indent=2))


if __name__ == "__main__":
    main()
