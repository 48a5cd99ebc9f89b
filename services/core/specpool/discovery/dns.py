"""Finds the addresses that a name has, such as those of the pods behind a headless service."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection
from typing import Final

from specpool.addresses import format_address
from specpool.discovery.discovery import Endpoint, ThreadedDiscovery

_logger = logging.getLogger(__name__)
_INTERVAL_S: Final = 1.0
"""Seconds between two lookups. The resolver caches for the record's time to live, so that asking it often is cheap; a
change is seen after at most that time and this one."""

Resolve = Callable[[str], Collection[str]]


def addresses_of(name: str) -> set[str]:
    """All addresses of a name, both families; blocks."""
    return {str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}


class DnsDiscovery(ThreadedDiscovery):
    """All IPv4 and IPv6 addresses of one name, looked up again and again.

    When the lookup fails the last answer stays: whether a process is still there, its connection tells better. That
    holds for a name that is not there, too, because a headless service without a ready pod has none.
    """

    def __init__(
        self, name: str, port: int, *, interval_s: float = _INTERVAL_S, resolve: Resolve = addresses_of
    ) -> None:
        super().__init__()
        self._name = name
        self._port = port
        self._interval_s = interval_s
        self._resolve = resolve
        self._error = ""

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._look()
            self._stopping.wait(self._interval_s)

    def _look(self) -> None:
        try:
            hosts = self._resolve(self._name)
        except (OSError, UnicodeError) as error:  # a name that cannot be encoded is no OSError
            if str(error) != self._error:
                _logger.warning("looking up %s failed, the last answer stays: %s", self._name, error)
            self._error = str(error)
            return
        self._error = ""
        self._hand_over(Endpoint(format_address(host, self._port)) for host in hosts)
