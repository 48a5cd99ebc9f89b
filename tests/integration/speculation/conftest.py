"""Engines that are no targets of ours, and speculators to script."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from specpool.discovery.discovery import Discovery
from specpool.speculation import PairingSettings, PoolEvents, PoolIdentity, SpeculationPool
from specpool.v1 import types_pb2

# Under --import-mode=importlib a folder of tests is no package: its helper module is loaded by path.
if "speculation_engine" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("speculation_engine", Path(__file__).with_name("engine.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["speculation_engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["speculation_engine"])

from speculation_engine import FINGERPRINT, LOOKAHEAD, VOCAB, ScriptedSpeculator


@pytest.fixture
async def speculator_for() -> AsyncIterator[Callable[..., Any]]:
    """Starts scripted speculators; kills them at the end."""
    running: list[ScriptedSpeculator] = []

    async def make(port: int = 0, **script: Any) -> ScriptedSpeculator:
        speculator = ScriptedSpeculator()
        for key, value in script.items():
            assert hasattr(speculator, key)
            setattr(speculator, key, value)
        await speculator.start(port)
        running.append(speculator)
        return speculator

    yield make
    for speculator in running:
        await speculator.kill()
        assert speculator.violations == []


@pytest.fixture
async def pool_for() -> AsyncIterator[Callable[..., Any]]:
    """Starts pools; closes them at the end."""
    running: list[SpeculationPool] = []

    async def make(directory: Discovery, **options: Any) -> SpeculationPool:
        labels, settings = options.pop("labels", {}), options.pop("settings", {})
        moves = options.pop("moves", Counter())
        identity = PoolIdentity(
            peer=types_pb2.Peer(id="engine"),
            model=types_pb2.ModelInfo(name="engine", vocab_size=VOCAB, tokenizer_fingerprint=FINGERPRINT),
            max_lookahead=LOOKAHEAD,
            labels=labels,
        )
        events = PoolEvents(on_move=lambda reason: moves.update([reason]))
        pool = SpeculationPool(directory, identity, settings=PairingSettings(**settings), events=events, **options)
        pool.start()
        running.append(pool)
        await asyncio.to_thread(pool.wait_settled, 10.0)
        return pool

    yield make
    for pool in running:
        await asyncio.to_thread(pool.close)
