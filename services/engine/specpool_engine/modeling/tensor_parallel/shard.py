"""One rank's part of a model."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from specpool_engine.modeling.attention import get_backend
from specpool_engine.modeling.checkpoint import read_model
from specpool_engine.modeling.device_sharing import limit_memory
from specpool_engine.modeling.model import KVGeometry, TransformersModel
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.tensor_parallel.messages import ShardSetup

_WATCHDOG_SLACK_S: Final = 60.0
"""Seconds by which NCCL's own watchdog, which ends the process without a word, comes after ours."""


class Shard:
    """One rank's weights, and then its model."""

    def __init__(self, setup: ShardSetup, store: Any) -> None:
        """Join the group through `open_store`'s store and load; all ranks do so at the same time."""
        self._setup = setup
        _join(setup, store)
        limit_memory(setup.device, setup.budget.memory_share)
        from transformers import DistributedConfig

        # `transformers` names the device after this variable, and wants one accelerator per rank.
        os.environ["LOCAL_RANK"] = str(setup.device.index or 0)
        self._model: Any = read_model(
            setup.spec,
            Path(setup.directory),
            setup.dtype,
            distributed_config=DistributedConfig(tp_size=setup.size),
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks that this rank's KV cache could have."""
        geometry = KVGeometry.of(self._model.config.get_text_config(), self._setup.size)
        return self._setup.budget.blocks(geometry.bytes_per_token(self._setup.dtype), self._setup.device)

    def allocate(self, num_blocks: int) -> TransformersModel:
        """Make the model over a KV cache of so many blocks."""
        return TransformersModel(
            self._model,
            pool=BlockPool(num_blocks, self._setup.budget.block_size),
            backend=get_backend(self._setup.backend),
            num_shards=self._setup.size,
        )

    def abort(self) -> None:
        """Make exchanges that wait for a lost rank return; what they computed is worthless. Only NCCL needs it."""
        if self._setup.device.type != "cuda":
            return
        groups: tuple[Any, ...] = (self._model._device_mesh["tp"].get_group(), dist.group.WORLD)
        for group in groups:
            group.abort()


def open_store(size: int, port: int | None = None) -> Any:
    """The store where `size` ranks meet on this machine: a new one on a free port, or the one on `port`."""
    stores: Any = dist
    return stores.TCPStore("127.0.0.1", port or 0, size, is_master=port is None, wait_for_workers=False)


def _join(setup: ShardSetup, store: Any) -> None:
    is_cuda = setup.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(setup.device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=setup.rank,
        world_size=setup.size,
        timeout=timedelta(seconds=setup.timeout_s + (_WATCHDOG_SLACK_S if is_cuda else 0.0)),
        device_id=setup.device if is_cuda else None,
    )
