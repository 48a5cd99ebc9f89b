"""The engine thread: owns the draft model and runs the loop.

    receive -> apply outcomes -> plan rows -> forward -> extend branches -> push tables

There is at most one forward between receiving an outcome and acting on it. With nothing to draft the thread blocks
on its queue.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specpool.algorithm.verification import VerificationMode
from specpool.errors import EngineFailed, SpecPoolError
from specpool.v1 import speculator_pb2
from specpool_speculator.dense.sending_group import Channel
from specpool_speculator.engine.drafter import Drafter
from specpool_speculator.metrics import SpeculatorMetrics

_logger = logging.getLogger(__name__)
_SMOOTHING = 0.1
"""Weight of the newest step in the averages that are reported as load."""

Command = Callable[[], None]


class Receiver(Protocol):
    """Where the responses of one stream go; called from the engine thread."""

    def deliver(self, responses: Sequence[speculator_pb2.SpeculateResponse]) -> None:
        """Must not block."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What others may know about the engine, replaced as a whole after every change."""

    num_sequences: int = 0
    num_targets: int = 0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    rows_per_step: float = 0.0
    step_ms: float = 0.0
    acceptance_rate: float = 0.0
    miss_power_law: tuple[float, ...] = ()
    """c, r after a rejection; c, r after everything was accepted."""
    confidence_spread: float = 0.0
    """See `RankCalibration.confidence_spread`."""
    plan: str = ""
    """What the rows of a step are planned from, in words."""


class EngineThread:
    """Runs a `Drafter` on its own thread."""

    def __init__(
        self,
        make_drafter: Callable[[], Drafter],
        metrics: SpeculatorMetrics,
        *,
        num_kv_blocks: int,
        num_free_kv_blocks: Callable[[], int],
        on_failure: Callable[[BaseException], None],
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_start` is called on the engine's thread."""
        self.snapshot = EngineSnapshot(num_kv_blocks=num_kv_blocks, num_free_kv_blocks=num_kv_blocks)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._receivers: dict[int, Receiver] = {}
        self._metrics = metrics
        self._drafter = make_drafter()
        self._num_free_kv_blocks = num_free_kv_blocks
        self._on_failure = on_failure
        self._before_start = before_start
        self._averages = (0.0, 0.0)
        self._seen_counters = (0, 0, 0, 0)
        self._thread = threading.Thread(target=self._main, name="speculator-engine", daemon=True)

    # ---- from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the running step and wait for it."""
        self._commands.put(None)
        self._thread.join()

    def abort(self, error: SpecPoolError) -> None:
        """End the thread as if a step had failed with `error`."""

        def command() -> None:
            raise error

        self._commands.put(command)

    def connect(self, connection: int, vocab_size: int, receiver: Receiver) -> None:
        """A target's stream was acknowledged."""

        def command() -> None:
            self._receivers[connection] = receiver
            self._drafter.connect(connection, vocab_size)

        self._commands.put(command)

    def submit(self, connection: int, request: speculator_pb2.SpeculateRequest) -> None:
        """A target said something."""
        received_s = time.monotonic()
        self._commands.put(lambda: self._drafter.apply(connection, request, received_s))

    def set_channel(self, connection: int, channel: Channel) -> None:
        """A process group with a target is there."""
        self._commands.put(lambda: self._drafter.set_channel(connection, channel))

    def drop_channel(self, connection: int, channel: Channel) -> None:
        """It is gone."""
        self._commands.put(lambda: self._drafter.drop_channel(connection, channel))

    def disconnect(self, connection: int) -> None:
        """A target's stream ended."""

        def command() -> None:
            self._receivers.pop(connection, None)
            self._drafter.disconnect(connection)

        self._commands.put(command)

    # ---- the thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._before_start()
            self._loop()
        except BaseException as error:
            _logger.critical("the engine failed", exc_info=error)
            is_typed = isinstance(error, EngineFailed)
            self._on_failure(error if is_typed else EngineFailed(f"the speculator's engine failed: {error!r}"))

    def _loop(self) -> None:
        worked = False
        self._update_snapshot()
        while self._receive(wait=not worked):
            self._answer()
            worked = self._drafter.step()
            if worked:
                self._answer()
                self._report_step()
            self._update_snapshot()
            if not worked:
                self._report_idle()

    def _receive(self, *, wait: bool) -> bool:
        """Apply all commands there are; with `wait`, first block until there is one or a deadline passes."""
        try:
            command = self._commands.get(wait, self._timeout_s() if wait else None)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _timeout_s(self) -> float | None:
        deadline_s = self._drafter.next_deadline_s()
        return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())

    def _answer(self) -> None:
        self._drafter.answer(time.monotonic())
        for connection, responses in self._drafter.outbox.take().items():
            receiver = self._receivers.get(connection)
            if receiver is not None:
                receiver.deliver(responses)

    def _report_step(self) -> None:
        step, counters = self._drafter.last_step, self._drafter.counters
        seen = (
            counters.num_table_entries, counters.num_dropped_branches, counters.num_stale, counters.num_resyncs,
        )  # fmt: skip
        gained = [now - before for now, before in zip(seen, self._seen_counters, strict=True)]
        self._seen_counters = seen
        step.num_table_entries, step.num_dropped_branches, step.num_stale_messages, num_resyncs = gained
        self._metrics.observe_step(step)
        for _ in range(num_resyncs):
            self._metrics.resync()
        rows, step_ms = self._averages
        self._averages = (
            rows + _SMOOTHING * (step.num_rows - rows),
            step_ms + _SMOOTHING * (step.step_s * 1e3 - step_ms),
        )

    def _report_idle(self) -> None:
        snapshot = self.snapshot
        usage = 1 - snapshot.num_free_kv_blocks / snapshot.num_kv_blocks
        self._metrics.set_idle(
            num_sequences=snapshot.num_sequences, num_targets=snapshot.num_targets, kv_cache_usage=usage
        )

    def _update_snapshot(self) -> None:
        estimates = self._drafter.estimates[VerificationMode.GREEDY]
        old, law = self.snapshot, self.snapshot.miss_power_law
        # A fit is too dear for every step: when sequences come and go is often enough.
        if old.num_sequences != self._drafter.num_sequences or not law:
            fits = [(fitted.constant, fitted.exponent) for fitted in estimates.miss_laws]
            law = (*fits[0], *fits[1])
            self._metrics.set_estimates(estimates.acceptance, {"rejection": fits[0], "acceptance": fits[1]})
        num_free = self._num_free_kv_blocks()
        self.snapshot = EngineSnapshot(
            num_sequences=self._drafter.num_sequences,
            num_targets=self._drafter.num_targets,
            num_kv_blocks=old.num_kv_blocks,
            num_free_kv_blocks=num_free,
            rows_per_step=self._averages[0],
            step_ms=self._averages[1],
            acceptance_rate=estimates.acceptance,
            miss_power_law=law,
            confidence_spread=estimates.calibration.confidence_spread,
            plan=self._explain_plan(),
        )

    def _explain_plan(self) -> str:
        time = self._drafter.step_time
        calibration = self._drafter.estimates[VerificationMode.GREEDY].calibration
        return (
            f"a step takes {time.base_s * 1e3:.1f} ms and {time.per_row_s * 1e3:.2f} ms per row, "
            f"{self._averages[0]:.1f} rows on average; the draft's scores count {calibration.slope:.2f} times, "
            f"its first rank {calibration.lift:+.2f} more, {calibration.outside:.1%} of tokens are outside its ranks"
        )
