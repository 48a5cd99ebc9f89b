"""vLLM on the same prompts: `gpu.py` runs this file with the Python that has vLLM, which may be another than its own.

    python tests/bench/vllm_peer.py REQUEST.json ANSWER.json

Every prompt is answered alone. The prefill is left out, as in our own figures, by answering once more with one token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 2048
"""Both models' context, prompt and answer: the default is the model's own, for which memory may not suffice."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to answer, and with what."""

    target: str
    draft: str | None
    """None is plain decoding."""
    lookahead: int
    dtype: str
    max_tokens: int
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of all prompts together."""

    name: str
    num_tokens: int
    """After the first of each answer."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode tokens over decode seconds."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


def is_installed(python: str) -> bool:
    """Whether this Python has vLLM."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def run(request: Request, python: str = sys.executable) -> Speed:
    """Answer in a process of its own, which gives the GPU back at its end; `RuntimeError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="specpool-vllm-") as name:
        asked, answered = Path(name, "request.json"), Path(name, "answer.json")
        asked.write_text(json.dumps(asdict(request)))
        finished = subprocess.run(
            [python, __file__, str(asked), str(answered)], capture_output=True, text=True, check=False
        )
        if finished.returncode:
            raise RuntimeError("\n".join(finished.stderr.splitlines()[-8:]))
        return Speed(**json.loads(answered.read_text()))


def answer(request: Request) -> Speed:
    """In the process that has vLLM."""
    from vllm import LLM  # type: ignore[import-not-found, unused-ignore]

    speculation = {"method": "draft_model", "model": request.draft, "num_speculative_tokens": request.lookahead}
    model = LLM(
        model=request.target,
        dtype=request.dtype,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        seed=0,
        speculative_config=speculation if request.draft else None,
    )
    prompts = [encode(model.get_tokenizer(), text) for text in request.texts]
    generate(model, prompts[0], request.max_tokens)  # warm up
    num_tokens, seconds = 0, 0.0
    for prompt in prompts:
        _, first_s = generate(model, prompt, 1)
        tokens, all_s = generate(model, prompt, request.max_tokens)
        num_tokens += len(tokens) - 1
        seconds += all_s - first_s
    name = f"vllm, draft model, K={request.lookahead}" if request.draft else "vllm, plain"
    return Speed(name=name, num_tokens=num_tokens, seconds=seconds)


def encode(tokenizer: Any, text: str) -> list[int]:
    """With the chat template, as our target does it."""
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def generate(model: Any, prompt: Sequence[int], max_tokens: int) -> tuple[Sequence[int], float]:
    """Greedy tokens, and the seconds that they took."""
    from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    start_s = time.perf_counter()
    (output,) = model.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)
    return output.outputs[0].token_ids, time.perf_counter() - start_s


def main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    speed = answer(Request(**json.loads(asked.read_text())))
    answered.write_text(json.dumps(asdict(speed)))


if __name__ == "__main__":
    main()
