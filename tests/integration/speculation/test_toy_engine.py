"""The engine of docs/speculation-client, which is no target of ours, beside a real speculator."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve

SCRIPT = Path(__file__).parents[3] / "docs" / "speculation-client" / "toy_engine.py"
PROMPT, VOCAB, SEED = [1, 2, 3], 32, 1


@pytest.fixture
def toy_engine():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("toy_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def speculator():
    """Address of a real speculator whose draft is the engine's own model."""
    ready, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
    config = SpeculatorConfig(model=f"toy#vocab={VOCAB},seed={SEED}", drain_grace_s=1.0, num_kv_blocks=512)
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED, timeout=60)
    yield ready.result()
    stop.set()
    await asyncio.wait_for(task, 30)


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 64


@pytest.mark.parametrize("directory", ["static", "nobody"])
async def test_it_decodes_as_without_speculators_but_in_fewer_forwards(toy_engine, speculator, directory):
    model, tokenizer = toy_engine.toy_model(VOCAB, SEED)
    tokens = list(PROMPT)
    for _ in range(120):
        tokens += model(tokens, 1)
    address = speculator if directory == "static" else "127.0.0.1:1"
    pool = await asyncio.to_thread(toy_engine.connect, f"static:{address}", tokenizer, VOCAB)
    try:
        output, num_forwards = await asyncio.to_thread(toy_engine.generate, pool, model, PROMPT, 120)
    finally:
        await asyncio.to_thread(pool.close)
    assert output == tokens[len(PROMPT) :]
    if directory == "static":
        assert num_forwards <= 60
    else:
        assert num_forwards == 120
