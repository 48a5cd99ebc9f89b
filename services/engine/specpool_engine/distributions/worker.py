"""The thread of one pair: builds its group and does the group's transfers, in order, until the first one that fails.

Nobody ever waits for it: what it is given is queued, what it brings is delivered by callbacks, and after `close` it
ends by itself, at the latest when the transfer that is under way times out.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final, Protocol

from specpool.errors import SpecPoolError, TransportUnavailable
from specpool_engine.distributions.group import PairGroup

_logger = logging.getLogger(__name__)
MAX_QUEUED_BYTES: Final = 256 << 20
"""Most bytes of bodies that wait for their transfer: a sender refuses more, a receiver gives up the group."""

Transfer = Callable[[PairGroup], None]


class MakesGroup(Protocol):
    """A recipe for a process group, such as `GroupMaker`."""

    def make(self) -> PairGroup:
        """Build the group; blocks until the other rank is there. Raises `TransportUnavailable`."""
        ...

    def cancel(self) -> None:
        """Have a running `make` fail soon. Callable from any thread."""
        ...


class PairWorker(threading.Thread):
    """One group from its making to its end. `submit` and `close` may be called from any thread and return at once."""

    def __init__(
        self,
        maker: MakesGroup,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[SpecPoolError], None],
        name: str,
        is_receiver: bool = False,
    ) -> None:
        """Prepare a thread that is not started yet.

        Args:
            maker: builds the group, on this thread.
            on_up: called on this thread once the group is there.
            on_down: called on this thread when the group could not be made or is lost, not after `close`.
            name: of the thread, for logs and debuggers.
            is_receiver: takes transfers from the start: the other side may be ready a moment earlier.
        """
        super().__init__(name=name, daemon=True)
        self.num_bytes = 0
        """Bytes of all bodies that were moved so far."""
        self._maker = maker
        self._on_up = on_up
        self._on_down = on_down
        self._closing = threading.Event()
        self._transfers: queue.SimpleQueue[tuple[Transfer, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_queued_bytes = 0
        self._accepts = is_receiver
        self._is_up = False

    @property
    def is_up(self) -> bool:
        """Whether the group was made and is not lost."""
        return self._is_up

    def submit(self, transfer: Transfer, num_bytes: int) -> bool:
        """Queue a transfer; False if there is no group or too much is queued."""
        with self._lock:
            if not self._accepts or self._num_queued_bytes + num_bytes > MAX_QUEUED_BYTES:
                return False
            self._num_queued_bytes += num_bytes
            self._transfers.put((transfer, num_bytes))
        return True

    def close(self) -> None:
        """End the thread; nothing more is called back but what a transfer under way brings."""
        self._closing.set()
        self._maker.cancel()
        self._go_down()
        self._transfers.put(None)

    def run(self) -> None:
        """Make the group and move what is submitted, until `close` or the first failure."""
        try:
            self._work()
        except SpecPoolError as error:
            self._fail(error)
        except Exception as error:
            _logger.exception("the transfers of a process group failed")
            self._fail(TransportUnavailable(f"{type(error).__name__}: {error}"))

    def _work(self) -> None:
        group = self._maker.make()
        try:
            with self._lock:
                self._is_up = self._accepts = not self._closing.is_set()
            if self._is_up:
                self._on_up()
            while not self._closing.is_set() and (item := self._transfers.get()) is not None:
                transfer, num_bytes = item
                with group.context():
                    transfer(group)
                with self._lock:
                    self._num_queued_bytes -= num_bytes
                    self.num_bytes += num_bytes
        finally:
            self._go_down()
            group.abort()

    def _fail(self, error: SpecPoolError) -> None:
        self._go_down()
        if not self._closing.is_set():
            self._on_down(error)

    def _go_down(self) -> None:
        with self._lock:
            self._is_up = self._accepts = False
