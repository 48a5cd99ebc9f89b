"""Rank 0: starts the followers, watches them, and is the model that an engine sees."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from specpool.errors import FollowerLost, SpecPoolError
from specpool_engine.modeling.checkpoint import read_config
from specpool_engine.modeling.files import Progress, resolve_model_directory
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.kv_budget import KVBudget
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.spec import ModelSpec
from specpool_engine.modeling.tensor_parallel.follower_process import FollowerProcess
from specpool_engine.modeling.tensor_parallel.messages import Imported, Ready, ShardSetup, encode_step
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism, check_model, refused
from specpool_engine.modeling.tensor_parallel.shard import Shard, open_store

_logger = logging.getLogger(__name__)
_POLL_S: Final = 0.2
_BLAME_S: Final = 2.0
"""Seconds to wait for who is to blame: an exchange fails before the end of the process at its other end is seen."""
_STUCK_S: Final = 10.0
"""Seconds for a step of ours to end after a follower was lost; then this process ends itself, to be restarted."""
Listener = Callable[[SpecPoolError], None]


class Watch(threading.Thread):
    """Sees followers end, and steps that take too long."""

    def __init__(self, followers: Sequence[FollowerProcess], step_timeout_s: float, abort: Callable[[], None]) -> None:
        super().__init__(name="watch of the followers", daemon=True)
        self._followers = {follower.connection.fileno(): follower for follower in followers}
        self._step_timeout_s = step_timeout_s
        self._abort = abort
        self._step_began_s: float | None = None
        self._closing = threading.Event()
        self._is_lost = threading.Event()
        self._listening = threading.Lock()
        self._listener: Listener | None = None
        self.error: SpecPoolError | None = None

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of a loss, past or to come."""
        with self._listening:
            self._listener = listener
            error = self.error
        if error is not None:
            listener(error)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context for a forward: what goes wrong in it because of a follower, now or before, is a `FollowerLost`."""
        self._check()
        self._step_began_s = time.monotonic()
        try:
            yield
        except Exception as error:
            if self._is_lost.wait(_BLAME_S) and self.error is not None:
                raise self.error from error
            raise
        finally:
            self._step_began_s = None
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Take the end of a follower for what was wanted from now on."""
        self._closing.set()
        self.join()

    def run(self) -> None:
        """Watch the followers, until `close` or the loss of one."""
        poller = select.poll()
        for file_descriptor in self._followers:
            poller.register(file_descriptor, 0)  # a hang-up is reported whatever is asked for
        while not self._closing.is_set():
            ended = poller.poll(_POLL_S * 1e3)
            if self._closing.is_set():
                break
            error = self._followers[ended[0][0]].lost() if ended else self._late()
            if error is not None:
                self._lose(error)
                break

    def _late(self) -> SpecPoolError | None:
        began_s = self._step_began_s
        if began_s is None or time.monotonic() - began_s < self._step_timeout_s:
            return None
        seconds = f"{self._step_timeout_s:g} s"
        return FollowerLost(f"a forward of the tensor parallel model took more than {seconds}")

    def _lose(self, error: SpecPoolError) -> None:
        with self._listening:
            self.error = error
            listener = self._listener
        self._is_lost.set()
        _logger.critical("%s", error)
        if listener is not None:
            listener(error)
        self._abort()
        if self._step_began_s is not None and not self._closing.wait(_STUCK_S) and self._step_began_s is not None:
            _logger.critical("a step still waits for the lost rank: this process ends")
            os._exit(1)


class TensorParallelModel:
    """A `DistributedModel`: rank 0's part, and the followers that compute the others."""

    def __init__(self, shard: TransformersModel, followers: Sequence[FollowerProcess], watch: Watch) -> None:
        self._shard = shard
        self._followers = followers
        self._watch = watch
        self.model = shard.model
        self.vocab_size = shard.vocab_size
        self.max_context = shard.max_context
        self.pool = shard.pool
        self.device = shard.device

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Logits [sum of num_logits, V] float32; raises `FollowerLost` if a follower is gone or does not answer."""
        copies = self._shard.reserve(segments)
        message = encode_step(segments, copies)
        with self._watch.step(), self._on_device():
            for follower in self._followers:
                follower.connection.send_bytes(message)
            logits = self._shard.execute(segments, copies)
            if logits.is_cuda:
                # A lost rank shows only where its part is waited for.
                torch.cuda.current_stream(logits.device).synchronize()
        for segment in segments:
            segment.kv.advance(len(segment.tokens))
        return logits

    def on_lost(self, listener: Listener) -> None:
        """Have `listener` told, on another thread, once a follower is lost."""
        self._watch.listen(listener)

    def close(self) -> None:
        """End the followers. May be called again."""
        _close(self._followers, self._watch)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """A context with our device as the current one: exchanges take that, and an engine's thread never chose one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def load_tensor_parallel(
    spec: ModelSpec,
    parallelism: TensorParallelism,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    budget: KVBudget,
    on_progress: Progress,
) -> TensorParallelModel:
    """Load a model split over the devices from `device` on.

    Raises:
        InvalidArgument: TENSOR_PARALLEL_UNAVAILABLE if this model cannot be split so.
        FollowerLost: if a follower ended or was not ready in time.
    """
    directory = resolve_model_directory(spec.source, on_progress)
    check_model(read_config(spec, directory).get_text_config(), parallelism)
    if dist.is_initialized():
        raise refused(parallelism.size, "this process is in a process group already")
    store = open_store(parallelism.size)
    setup = ShardSetup(
        spec=spec,
        directory=str(directory),
        rank=0,
        size=parallelism.size,
        store_port=store.port,
        dtype=dtype,
        device=device,
        backend=backend,
        budget=budget,
        timeout_s=parallelism.step_timeout_s,
    )
    on_progress("load", 0, 1)
    followers = [FollowerProcess(rank) for rank in range(1, parallelism.size)]
    try:
        return _assemble(setup, followers, parallelism, store, on_progress)
    except BaseException:
        _close(followers)
        raise


def _assemble(
    setup: ShardSetup,
    followers: Sequence[FollowerProcess],
    parallelism: TensorParallelism,
    store: Any,
    on_progress: Progress,
) -> TensorParallelModel:
    deadline_s = time.monotonic() + parallelism.start_timeout_s
    for follower, device in zip(followers, parallelism.devices(setup.device)[1:], strict=True):
        follower.connection.send(replace(setup, rank=follower.rank, device=device))
    for follower in followers:
        follower.receive(Imported, deadline_s)
    shard = Shard(replace(setup, device=parallelism.devices(setup.device)[0]), store)
    num_blocks = min(shard.num_blocks, *(follower.receive(int, deadline_s) for follower in followers))
    on_progress("load", 1, 1)
    on_progress("allocate", 0, 1)
    for follower in followers:
        follower.connection.send(num_blocks)
    model = shard.allocate(num_blocks)
    for follower in followers:
        follower.receive(Ready, deadline_s)
    on_progress("allocate", 1, 1)
    watch = Watch(followers, parallelism.step_timeout_s, shard.abort)
    watch.start()
    return TensorParallelModel(model, followers, watch)


def _close(followers: Sequence[FollowerProcess], watch: Watch | None = None) -> None:
    if watch is not None:
        watch.close()
    for follower in followers:
        follower.connection.close()
    for follower in followers:
        follower.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
