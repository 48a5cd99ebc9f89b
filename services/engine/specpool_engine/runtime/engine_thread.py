"""The thread of an engine: commands, waiting with deadlines, failure, stop. See the package for the seam around it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

from specpool.errors import EngineFailed, SpecPoolError
from specpool_engine.runtime.heartbeat import IDLE, Heartbeat
from specpool_engine.runtime.outbox import call_on_loop

_logger = logging.getLogger(__name__)

Command = Callable[[], None]


class Engine(Protocol):
    """An engine as its thread sees it. Every method is called on that thread alone."""

    def warm_up(self) -> None:
        """Run the first forwards, which allocate, compile and page in: nobody should wait for that."""
        ...

    def step(self) -> bool:
        """Run one step; False if there was nothing to compute: then the thread waits for a command or a deadline."""
        ...

    def seconds_to_deadline(self) -> float | None:
        """Seconds until the engine wants its next step without a command; None: not before one."""
        ...


class EngineThread:
    """Runs an engine. Every method may be called from any thread, unless it says otherwise."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        on_failed: Callable[[EngineFailed], None],
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the thread; it is not started yet.

        Args:
            engine: what to run.
            name: for logs and errors ("target engine").
            loop: of the wire.
            on_failed: called once on `loop` if the engine cannot go on, with the error that `failure` has from then on.
            before_start: called on the thread before everything else.
        """
        self.heartbeat = Heartbeat()
        self.failure: EngineFailed | None = None
        self._engine = engine
        self.name = name
        self._loop = loop
        self._on_failed = on_failed
        self._before_start = before_start
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._deferred: list[Command] = []
        """Taken from the queue in the middle of a step; run after it."""
        self._submitting = threading.Lock()
        """Guards `failure`: whatever was submitted before it is known to the wire when it hears of it."""
        self._is_stopping = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # ---- called by the wire -----------------------------------------------------------------------------------

    @property
    def ident(self) -> int | None:
        """The thread's identifier; None before it runs."""
        return self._thread.ident

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the warm-up is through. Raises EngineFailed if it failed, or is not through in time."""
        if not self._ready.wait(timeout_s):
            raise EngineFailed(f"the {self.name} is not ready after {timeout_s:g} s")
        if self.failure is not None:
            raise self.failure

    def call(self, command: Command) -> None:
        """Run `command` on the thread, before its next step; it is dropped if the engine has failed."""
        self._commands.put(command)

    def submit(self, command: Command, accept: Callable[[], None]) -> None:
        """Run `command` like `call`, which must not be lost: raises the engine's failure, or what `accept` raises.

        `accept` is called here and now, and makes the wire ready to hear of what becomes of the command.
        """
        with self._submitting:
            if self.failure is not None:
                raise self.failure
            accept()
            self._commands.put(command)

    def abort(self, error: SpecPoolError) -> None:
        """Fail with `error`: the engine cannot go on; a step that runs is not waited for."""
        self._fail(error)
        self.call(_nothing)

    def stop(self) -> None:
        """End the thread after the running step."""
        self._is_stopping = True
        self.call(_nothing)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; returns whether it ended in time."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- called by the engine, on the thread ------------------------------------------------------------------

    def defer_a_command(self, timeout_s: float) -> None:
        """Wait for a command, and keep it: in the middle of a step nothing may change."""
        with suppress(queue.Empty):
            self._deferred.append(self._commands.get(timeout=timeout_s))

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._before_start()
                self._engine.warm_up()
                self._ready.set()
                is_idle = True
                while self._receive(wait=is_idle):
                    self.heartbeat.begin("in a step")
                    is_idle = not self._engine.step()
                    self.heartbeat.num_steps += not is_idle
        except BaseException as error:
            _logger.critical("the %s failed", self.name, exc_info=error)
            self._fail(error)
        finally:
            self.heartbeat.begin(IDLE)
            self._ready.set()

    def _receive(self, *, wait: bool) -> bool:
        """Run the commands that are there; with `wait`, first block until there is one, or until a deadline.

        Returns False at the end.
        """
        deferred, self._deferred = self._deferred, []
        for command in deferred:
            command()
        wait = wait and not deferred
        if wait:
            self.heartbeat.begin(IDLE)
        with suppress(queue.Empty):
            command = self._commands.get(wait, self._engine.seconds_to_deadline() if wait else None)
            self.heartbeat.begin("in a command")
            while not self._is_stopping:
                command()
                command = self._commands.get_nowait()
        return not self._is_stopping

    def _fail(self, error: BaseException) -> None:
        with self._submitting:
            if self.failure is not None:
                return
            self.failure = failure = (
                error
                if isinstance(error, EngineFailed)
                else EngineFailed(f"the {self.name} failed: {type(error).__name__}: {error}")
            )
        self._is_stopping = True
        self._ready.set()
        call_on_loop(self._loop, lambda: self._on_failed(failure))


def _nothing() -> None:
    """Do nothing but wake the thread."""
