"""A speculator's side in a process of its own: sends body 1 and then nothing. For test_worker.py."""

from __future__ import annotations

import json
import sys
import threading
import time

import torch

from specpool_engine.distributions.group import GroupMaker
from specpool_engine.distributions.stream_store import StreamStore
from specpool_engine.distributions.transport import Transport


def main() -> None:
    transport = Transport[sys.argv[1].upper()]
    device = torch.device("cuda", 0) if transport is Transport.NCCL else torch.device("cpu")
    store = StreamStore(lambda key, value: print(json.dumps([key, value.hex()]), flush=True), 60.0)
    threading.Thread(target=read, args=(store,), daemon=True).start()
    group = GroupMaker(transport=transport, rank=0, store=store, peer_host="127.0.0.1", device=device).make()
    with group.context():
        group.send(torch.arange(8.0, device=device), 1)
    time.sleep(60)


def read(store: StreamStore) -> None:
    for line in sys.stdin:
        key, value = json.loads(line)
        store.receive(key, bytes.fromhex(value))


main()
