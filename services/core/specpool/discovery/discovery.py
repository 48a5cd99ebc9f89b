"""Where targets and speculators are: one interface, a static list or Kubernetes behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A pod, or a process of a static list."""

    address: str
    """host:port."""
    uid: str = ""
    """Of the pod; another uid at the same address is another pod. Empty for static endpoints."""


class Discovery(ABC):
    """Keeps a set of endpoints and tells when it changes, on the event loop."""

    def __init__(self) -> None:
        self._endpoints: frozenset[Endpoint] = frozenset()
        self._callbacks: list[Callable[[frozenset[Endpoint]], None]] = []

    @property
    def endpoints(self) -> frozenset[Endpoint]:
        """The current ones."""
        return self._endpoints

    def on_change(self, callback: Callable[[frozenset[Endpoint]], None]) -> None:
        """Call ``callback`` with all endpoints whenever they change."""
        self._callbacks.append(callback)

    @abstractmethod
    async def start(self) -> None:
        """Begin to look."""

    @abstractmethod
    async def close(self) -> None:
        """Stop looking."""

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
        """Nothing runs."""
