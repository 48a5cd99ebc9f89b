"""The process group of one (target, speculator) pair: two ranks, tensors from rank 0 to rank 1.

Groups are built directly on torch's backends: there is no default process group, so that a process can have as many
pairs as it likes, and losing one says nothing about the others. Every wait has a deadline, after which the group is
given up as a whole: neither backend can be used after a transfer that did not end.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final

import torch
import torch.distributed
from torch import Tensor
from torch._C._distributed_c10d import Store

from specpool.errors import TransportUnavailable
from specpool_engine.distributions.stream_store import StreamStore, local_address
from specpool_engine.distributions.transport import Transport

SPECULATOR_RANK: Final = 0
TARGET_RANK: Final = 1
TRANSFER_S: Final = 2.0
"""Longest time in seconds for the transfer of one body; then the group is given up."""
CREATION_S: Final = 20.0
"""Longest wait in seconds for the other rank, for the connections, and for the first transfer, each."""
_MAX_TAG: Final = 1 << 30
_POLL_S: Final = 0.0001


class PairGroup(ABC):
    """One group, used by one thread, inside `context`."""

    device: torch.device
    """Device on which the tensors lie that the group moves."""

    def context(self) -> AbstractContextManager[object]:
        """The context in which everything that touches a body must happen: a CUDA stream, or nothing."""
        return nullcontext()

    @abstractmethod
    def send(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        """Send `body`, contiguous and on `device`, from rank 0. Raises `TransportUnavailable`: the group is lost."""

    @abstractmethod
    def receive(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        """Fill `body` at rank 1; shape, type and number must be the sender's. Raises `TransportUnavailable`."""

    @abstractmethod
    def abort(self) -> None:
        """Give the group up, without waiting for the other rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMaker:
    """Everything that one rank needs to build its half of a group."""

    transport: Transport
    rank: int
    store: StreamStore
    """Where both ranks of this group meet; no other group uses it."""
    peer_host: str
    """The host of the other rank, as this side reaches it."""
    device: torch.device
    """Device of the model: NCCL's transfers begin or end there."""
    creation_s: float = CREATION_S

    def make(self) -> PairGroup:
        """Meet the other rank, build the group, try it. Raises `TransportUnavailable`; ends soon after `cancel`."""
        try:
            group = self._build(self.store)
        except RuntimeError as error:
            raise TransportUnavailable(f"no {self.transport.label} group with {self.peer_host}: {error}") from error
        with group.context():
            self._try(group)
        return group

    def cancel(self) -> None:
        """Do not wait for the other rank any longer."""
        self.store.close()

    def _build(self, store: Store) -> PairGroup:
        if self.transport is Transport.NCCL:
            return NcclGroup(store, self.rank, self.device)
        return GlooGroup(store, self.rank, local_address(self.peer_host), self.creation_s)

    def _try(self, group: PairGroup) -> None:
        """Make the first transfer: connections are made by it at the latest, so it takes longer than the others."""
        probe = torch.full((1,), float(self.rank == SPECULATOR_RANK), device=group.device)
        try:
            if self.rank == SPECULATOR_RANK:
                group.send(probe, 0, self.creation_s)
            else:
                group.receive(probe, 0, self.creation_s)
                if probe.item() != 1:
                    raise TransportUnavailable("the first transfer of the process group brought something else")
        except TransportUnavailable:
            group.abort()
            raise


class GlooGroup(PairGroup):
    """A group whose transfers go over TCP, from host memory to host memory."""

    def __init__(self, store: Store, rank: int, address: str, creation_s: float = CREATION_S) -> None:
        """Meet the other rank in `store` and connect to it from this side's own `address`. Raises RuntimeError."""
        options = torch.distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [_gloo_device(address, os.environ.get("GLOO_SOCKET_IFNAME", ""))]
        options._threads = 1
        options._timeout = timedelta(seconds=creation_s)
        self.device = torch.device("cpu")
        self._peer = 1 - rank
        self._group: Any = torch.distributed.ProcessGroupGloo(store, rank, 2, options)

    def send(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        self._wait(lambda: self._group.send([body], self._peer, number % _MAX_TAG), timeout_s)

    def receive(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        self._wait(lambda: self._group.recv([body], self._peer, number % _MAX_TAG), timeout_s)

    def _wait(self, start: Callable[[], Any], timeout_s: float) -> None:
        # A wait that timed out, or whose peer is gone, raises; nothing else ends it, `abort` least of all.
        try:
            start().wait(timedelta(seconds=timeout_s))
        except (RuntimeError, AttributeError) as error:
            raise TransportUnavailable(f"a gloo transfer failed: {error}") from error

    def abort(self) -> None:
        self._group = None  # closes the sockets when no transfer is under way any more


class NcclGroup(PairGroup):
    """A group whose transfers go from GPU to GPU, on a CUDA stream of their own."""

    def __init__(self, store: Store, rank: int, device: torch.device) -> None:
        """Meet the other rank in `store` and make a communicator with it on `device`. Raises RuntimeError."""
        # torch would end the process when a communicator fails: here that is an event like any other.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        self.device = device
        self._peer = 1 - rank
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)  # deadlines are kept here
        torch.cuda.set_device(device)
        self._group: Any = torch.distributed.ProcessGroupNCCL(store, rank, 2, options)
        self._group.eager_connect_single_device(device)

    def context(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def send(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        self._wait(lambda: self._group.send([body], self._peer, 0), timeout_s)

    def receive(self, body: Tensor, number: int, timeout_s: float = TRANSFER_S) -> None:
        self._wait(lambda: self._group.recv([body], self._peer, 0), timeout_s)

    def _wait(self, start: Callable[[], Any], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        try:
            work = start()
            while not work.is_completed():
                if time.monotonic() > deadline_s:
                    raise TransportUnavailable(f"an nccl transfer took longer than {timeout_s:g} s")
                time.sleep(_POLL_S)
            work.wait()  # returns at once; what follows on this stream may use the body
        except (RuntimeError, AttributeError) as error:
            raise TransportUnavailable(f"an nccl transfer failed: {error}") from error

    def abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


@lru_cache(maxsize=8)
def _gloo_device(address: str, interface: str) -> Any:
    """The gloo device that the groups of a process share: it has a thread of its own."""
    make = torch.distributed.ProcessGroupGloo.create_device
    if interface:
        return make(interface=interface.split(",")[0])
    return make(hostname=address) if address else torch.distributed.ProcessGroupGloo.create_default_device()
