"""Workers of both ranks over real gloo, in threads or in two processes, and what they call back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from specpool.errors import SpecPoolError
from specpool_engine.distributions.group import GroupMaker
from specpool_engine.distributions.stream_store import StreamStore
from specpool_engine.distributions.transport import Transport
from specpool_engine.distributions.worker import PairWorker

SENDER = Path(__file__).with_name("sender.py")


class Side:
    """One rank's worker."""

    def __init__(self, store: StreamStore, rank: int, changes: dict[str, object]) -> None:
        self.up = threading.Event()
        self.down = threading.Event()
        self.error: SpecPoolError | None = None
        self.other = changes.pop("other", None)
        fields = {
            "transport": Transport.GLOO,
            "rank": rank,
            "store": store,
            "peer_host": "127.0.0.1",
            "device": torch.device("cpu"),
            "creation_s": 5.0,
        }
        maker = GroupMaker(**(fields | changes))
        self.worker = PairWorker(maker, on_up=self.up.set, on_down=self._lost, name=f"rank {rank}")
        self.worker.start()

    def _lost(self, error: SpecPoolError) -> None:
        self.error = error
        self.down.set()

    def send(self, body: torch.Tensor, number: int) -> bool:
        return self.worker.submit(lambda group: group.send(body, number), body.nbytes)

    def receive(self, body: torch.Tensor, number: int, timeout_s: float = 2.0) -> threading.Event:
        done = threading.Event()

        def transfer(group) -> None:
            group.receive(body, number, timeout_s)
            done.set()

        assert self.worker.submit(transfer, body.nbytes)
        return done

    def ends_within(self, seconds: float) -> bool:
        self.worker.join(seconds)
        return not self.worker.is_alive()


class OtherProcess:
    """A speculator's side in a process of its own; keys travel over its pipes."""

    def __init__(self, transport: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SENDER), transport],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.store: StreamStore | None = None

    def send(self, key: str, value: bytes) -> None:
        self.process.stdin.write(json.dumps([key, value.hex()]) + "\n")
        self.process.stdin.flush()

    def read(self) -> None:
        for line in self.process.stdout:
            key, value = json.loads(line)
            self.store.receive(key, bytes.fromhex(value))


@pytest.fixture
def other_process() -> Iterator[Callable[..., OtherProcess]]:
    others: list[OtherProcess] = []

    def make(transport: str = "gloo", **environment: str) -> OtherProcess:
        others.append(OtherProcess(transport, environment))
        return others[-1]

    yield make
    for other in others:
        other.process.kill()
        other.process.wait(10)


@pytest.fixture
def side_for() -> Iterator[Callable[..., Side]]:
    """Starts workers; sides of one name are a pair. At the end all of them stop, and their threads are gone."""
    stores: dict[tuple[str, int], StreamStore] = {}
    waiting: dict[tuple[str, int], list[tuple[str, bytes]]] = {}
    sides: list[Side] = []

    def make(name: str, rank: int, **changes: object) -> Side:
        other = changes.get("other")

        def send(key: str, value: bytes) -> None:
            if other is not None:
                other.send(key, value)
            elif (name, 1 - rank) in stores:
                stores[name, 1 - rank].receive(key, value)
            else:
                waiting.setdefault((name, 1 - rank), []).append((key, value))

        store = stores[name, rank] = StreamStore(send, float(changes.get("creation_s", 5.0)))
        for key, value in waiting.pop((name, rank), []):
            store.receive(key, value)
        if other is not None:
            other.store = store
            threading.Thread(target=other.read, daemon=True).start()
        sides.append(Side(store, rank, changes))
        return sides[-1]

    yield make
    for side in sides:
        side.worker.close()
    deadline_s = time.monotonic() + 10
    assert all(side.ends_within(max(0.0, deadline_s - time.monotonic())) for side in sides)
