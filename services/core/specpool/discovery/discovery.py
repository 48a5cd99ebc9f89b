"""Where targets and speculators are: the interface that every directory implements, and the simplest one."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

NODE: Final = "node"
ZONE: Final = "zone"
REGION: Final = "region"
RACK: Final = "rack"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A process that can be called: a pod, an address that a name has, an entry of a list."""

    address: str
    """Address as host:port."""
    uid: str = ""
    """Identity of the pod; another uid at the same address is another pod. Empty where the directory knows none."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Labels that say where it runs, as far as the directory knows: `NODE`, `ZONE`, `REGION`, `RACK`."""
    terminating: bool = False
    """Whether it goes soon and still serves: nothing new should start there while there is another."""
    ready: bool = True
    """False where only the way to it is in doubt, as when its node cannot be reached: better than none."""

    def is_same(self, other: Endpoint) -> bool:
        """Whether both are one process, whatever else is known of it now."""
        return (self.address, self.uid) == (other.address, other.uid)


Endpoints = frozenset[Endpoint]


class Discovery(ABC):
    """Keeps a set of endpoints and tells when it changes, on the event loop it was started on."""

    def __init__(self) -> None:
        self._endpoints: Endpoints = frozenset()
        self._callbacks: list[Callable[[Endpoints], None]] = []

    @property
    def endpoints(self) -> Endpoints:
        """The current endpoints."""
        return self._endpoints

    def on_change(self, callback: Callable[[Endpoints], None]) -> None:
        """Call ``callback`` with all endpoints whenever they change."""
        self._callbacks.append(callback)

    @abstractmethod
    async def start(self) -> None:
        """Begin to look; returns at once."""

    @abstractmethod
    async def close(self) -> None:
        """Stop looking; returns at once."""

    def _publish(self, endpoints: Iterable[Endpoint]) -> None:
        found = frozenset(endpoints)
        if found == self._endpoints:
            return
        self._endpoints = found
        for callback in self._callbacks:
            callback(found)


class StaticDiscovery(Discovery):
    """A list that never changes."""

    def __init__(self, addresses: Iterable[str]) -> None:
        super().__init__()
        self._addresses = tuple(addresses)

    async def start(self) -> None:
        """Publish the list."""
        self._publish(Endpoint(address) for address in self._addresses)

    async def close(self) -> None:
        """Do nothing: nothing runs."""


class ThreadedDiscovery(Discovery):
    """Looks with calls that block: a thread of its own makes them, and hands what it found to the event loop.

    The thread is a daemon that nobody waits for, because nothing bounds how long a resolver or an API server may hang.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="discovery", daemon=True).start()

    async def close(self) -> None:
        """Ask the thread to stop."""
        self._stopping.set()

    @abstractmethod
    def _run(self) -> None:
        """Look until `_stopping` is set, in the thread."""

    def _hand_over(self, endpoints: Iterable[Endpoint]) -> None:
        assert self._loop is not None
        found = frozenset(endpoints)
        if self._stopping.is_set():
            return
        try:
            self._loop.call_soon_threadsafe(self._publish_if_open, found)
        except RuntimeError:  # the loop is closed: the process is ending
            self._stopping.set()

    def _publish_if_open(self, found: Endpoints) -> None:
        if not self._stopping.is_set():
            self._publish(found)
