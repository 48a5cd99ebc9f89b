"""A toy engine, and the decoding it must reproduce, written as plainly as possible."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

# Under --import-mode=importlib a folder of tests is no package: its helper module is loaded by path.
if "one_speculator" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("one_speculator", Path(__file__).with_name("one_speculator.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["one_speculator"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["one_speculator"])

from one_speculator import OneSpeculator

from specpool.algorithm.noise import Stream, gumbel_argmax
from specpool.algorithm.sampling import SamplingParams, process_logits
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.toy import ToyModel, ToyTable, ToyTokenizer
from specpool_target.config import TargetConfig
from specpool_target.engine.engine import TargetEngine
from specpool_target.engine.sequence import Finish, FinishReason, SequenceRequest, SequenceUpdate, SpeculationMode
from specpool_target.metrics import TargetMetrics

VOCAB = 24


@dataclass
class Result:
    """All updates of a sequence, added up."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def reason(self) -> FinishReason:
        assert self.finish is not None
        return self.finish.reason


class Bench:
    """An engine, and helpers to run sequences on it."""

    def __init__(self, *, num_blocks: int = 64, block_size: int = 4, context: int = 256, **config: object) -> None:
        self.table = ToyTable(VOCAB, seed=3, sharpness=2.0)
        self.pool = BlockPool(num_blocks, block_size)
        self.model = ToyModel(self.table, self.pool, max_context=context)
        self.engine = TargetEngine(
            self.model,
            TargetConfig(model="toy", block_size=block_size, **config),
            loop=asyncio.get_running_loop(),
            metrics=TargetMetrics("toy"),
            make_pool=lambda events: OneSpeculator(events, is_connected=False),
        )

    def start(self) -> None:
        self.engine.thread.start()
        self.engine.thread.wait_ready(10)

    def submit(self, request: SequenceRequest, *, tokenizer: object = None) -> asyncio.Queue[SequenceUpdate]:
        updates: asyncio.Queue[SequenceUpdate] = asyncio.Queue()
        detokenizer = None
        if request.sampling.stop:
            detokenizer = IncrementalDetokenizer(TextCodec(ToyTokenizer(VOCAB)).decode, stop=request.sampling.stop)
        self.engine.submit(request, updates.put_nowait, detokenizer=detokenizer)
        return updates

    async def collect(self, updates: asyncio.Queue[SequenceUpdate]) -> Result:
        result = Result()
        while result.finish is None and result.error is None:
            update = await asyncio.wait_for(updates.get(), 20)
            result.tokens += update.tokens
            result.text += update.text or ""
            result.logprobs += update.logprobs
            result.finish, result.error = update.finish, update.error
        return result

    async def run(self, request: SequenceRequest) -> Result:
        return await self.collect(self.submit(request))

    def decode(self, prompt: Sequence[int], params: SamplingParams, *, stop_tokens: Sequence[int] = ()) -> list[int]:
        """Plain decoding: one token after the other, straight from the table."""
        tokens = list(prompt)
        while len(tokens) - len(prompt) < params.max_tokens:
            row = self.table.logits(tokens[-2] if len(tokens) > 1 else -1, tokens[-1])[None]
            scores = process_logits(row, params, prompt_tokens=prompt, output_tokens=tokens[len(prompt) :])
            if params.is_greedy:
                token = int(scores.argmax())
            else:
                position = torch.tensor([len(tokens)])
                token = int(gumbel_argmax(scores, params.seed, position, Stream.TARGET))
            tokens.append(token)
            if token in stop_tokens:
                break
        return tokens[len(prompt) :]

    async def idle(self) -> None:
        """Until the engine has dealt with everything sent so far."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.engine.thread.call(lambda: loop.call_soon_threadsafe(done.set))
        await asyncio.wait_for(done.wait(), 10)


def make_request(name: str, prompt: Sequence[int], **sampling: object) -> SequenceRequest:
    """A request without speculation; `sampling` overrides greedy, 20 tokens."""
    fields = {"temperature": 0.0, "max_tokens": 20, "seed": 7, "ignore_eos": True} | sampling
    return SequenceRequest(
        id=name,
        prompt_tokens=list(prompt),
        sampling=SamplingParams(**fields),
        mode=SpeculationMode.OFF,
        stop_token_ids=frozenset(fields.get("stop_token_ids", ())),
    )


@pytest.fixture
def request_for() -> Callable[..., SequenceRequest]:
    return make_request


@pytest.fixture
async def bench_for() -> AsyncIterator[Callable[..., Bench]]:
    """Makes started benches; stops them."""
    benches: list[Bench] = []

    def make(*, start: bool = True, **options: object) -> Bench:
        bench = Bench(**options)
        benches.append(bench)
        if start:
            bench.start()
        return bench

    yield make
    for bench in benches:
        bench.engine.thread.stop()
        await asyncio.to_thread(bench.engine.thread.join, 10)
