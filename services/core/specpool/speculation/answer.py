"""The draft that a sequence waits for, if it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from specpool.speculation.trust import WaitTrust

OnAnswer = Callable[[tuple[int, ...]], None]


class Answer:
    """A requested draft. Asked for and taken under its handle's lock; whoever took `on_answer` calls it without."""

    def __init__(self) -> None:
        self._on_answer: OnAnswer | None = None
        self._tokens: tuple[int, ...] = ()
        self._arrived = threading.Event()
        self._arrived.set()

    @property
    def is_due(self) -> bool:
        """Whether the requested draft is still to come."""
        return self._on_answer is not None

    def ask(self, on_answer: OnAnswer | None) -> None:
        """Note that a draft is on its way; without `on_answer` it is for whoever waits."""
        self._tokens = ()
        if on_answer is None:
            self._arrived.clear()
        self._on_answer = on_answer or self._keep

    def take(self) -> OnAnswer | None:
        """The callback for the tokens, given out once; None if nothing is due."""
        on_answer, self._on_answer = self._on_answer, None
        return on_answer

    def drop(self) -> None:
        """Nobody wants it any more."""
        self._on_answer = None
        if not self._arrived.is_set():
            self._arrived.set()

    def _keep(self, tokens: tuple[int, ...]) -> None:
        self._tokens = tokens
        self._arrived.set()

    def wait(self, timeout_s: float, trust: WaitTrust | None) -> tuple[int, ...]:
        """Block for the tokens; none when the time is over, which costs trust."""
        started_s = time.perf_counter()
        in_time = self._arrived.wait(timeout_s)
        if trust is not None and not self._tokens:
            if not in_time:
                trust.timed_out()
            trust.wasted(time.perf_counter() - started_s)
        return self._tokens
