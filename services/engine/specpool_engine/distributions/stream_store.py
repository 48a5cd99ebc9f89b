"""Where the two ranks of a pair find each other: a key-value store whose keys travel in the pair's own gRPC stream.

torch builds a group over a store that both ranks see. One over the stream needs no server, no port and no credentials
of its own, it ends when the stream ends, and its waits can be interrupted, which those of torch's stores cannot.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import Store

MAX_KEYS = 64
"""Most keys; beyond this the other side does something else than build a group."""


class StreamStore(Store):
    """One side's view; what is set on one side becomes known on both."""

    def __init__(self, send: Callable[[str, bytes], None], timeout_s: float) -> None:
        """Begin with an empty store.

        Args:
            send: hands a key and its value to the other side's `receive`, without waiting.
            timeout_s: longest wait for all keys together, from now on.
        """
        super().__init__()
        self._send = send
        self._deadline_s = time.monotonic() + timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def receive(self, key: str, value: bytes) -> None:
        """Take in a key that the other side set."""
        with self._changed:
            if len(self._values) < MAX_KEYS:
                self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # What torch calls, from any thread. It takes any RuntimeError for a failed rendezvous.

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key here and, without waiting, on the other side."""
        encoded = value.encode() if isinstance(value, str) else bytes(value)
        self.receive(key, encoded)
        self._send(key, encoded)

    def get(self, key: str) -> bytes:
        """The value of a key, once it is set on either side. Raises RuntimeError as `wait` does."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` are set, until the store's own deadline: `timeout` is ignored. Raises RuntimeError."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self._is_closed or all(key in self._values for key in keys),
                max(0.0, self._deadline_s - time.monotonic()),
            )
        if self._is_closed:
            raise RuntimeError("the connection was closed while its process group was made")
        if not is_there:
            raise RuntimeError("the other side did not come in time")

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` are set now."""
        return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        """Remove a key on this side only; returns whether it was there."""
        return self._values.pop(key, None) is not None

    def set_timeout(self, timeout: timedelta) -> None:
        """Ignore the timeout that torch would set: the store has its own deadline."""


def local_address(host: str, port: int = 1) -> str:
    """This machine's address on the way to `host`; empty if there is none."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return ""
