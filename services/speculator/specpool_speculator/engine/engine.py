"""The speculator's engine: owns the draft model and runs the loop.

    receive -> apply outcomes -> schedule rows -> forward -> extend branches -> push tables

There is at most one forward between receiving an outcome and acting on it. With nothing to draft the thread waits for
commands.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from specpool.algorithm.verification import VerificationMode
from specpool.errors import EngineFailed
from specpool.v1 import speculator_pb2
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_engine.runtime.outbox import Outbox
from specpool_speculator.dense.sending_group import Channel
from specpool_speculator.engine.drafter import Drafter
from specpool_speculator.engine.refusals import Reason, label
from specpool_speculator.metrics import SpeculatorMetrics

_SMOOTHING = 0.1
"""Weight of the newest step in the averages that are reported as load."""
_SNAPSHOT_S = 0.02
"""Least seconds between two snapshots while steps follow one another and no sequence comes or goes."""


class Receiver(Protocol):
    """Where the responses of one stream go; called on the event loop."""

    def send(self, *responses: speculator_pb2.SpeculateResponse) -> None:
        """Queue responses to the target, in order."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What status and load reports may know about the engine, replaced as a whole; while it drafts up to 20 ms old."""

    num_sequences: int = 0
    num_targets: int = 0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    rows_per_step: float = 0.0
    step_ms: float = 0.0
    num_prefix_queried_tokens: int = 0
    """Tokens of sequences that came since the start, looked up in the prefix cache."""
    num_prefix_hit_tokens: int = 0
    """Tokens of these that the prefix cache had."""
    acceptance_rate: float = 0.0
    miss_power_law: tuple[float, ...] = ()
    """Power laws of misses: c, r after a rejection; c, r after everything was accepted."""
    confidence_spread: float = 0.0
    """How much surer the draft is in some places than in others, 0 to 1: `RankCalibration.confidence_spread`."""
    explanation: str = ""
    """What the rows of a step are chosen from, in words."""
    refusals: Mapping[Reason, int] = field(default_factory=dict)
    """Sequences refused since the start, by reason."""


class SpeculatorEngine:
    """Runs a `Drafter` on an `EngineThread`, and keeps what others may know of it."""

    def __init__(
        self,
        make_drafter: Callable[[], Drafter],
        metrics: SpeculatorMetrics,
        pool: BlockPool,
        *,
        loop: asyncio.AbstractEventLoop,
        on_failed: Callable[[EngineFailed], None],
        warm_up: Callable[[], None] = lambda: None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the engine; its thread is not started yet.

        Args:
            make_drafter: of what the engine runs.
            metrics: told of every step.
            pool: of the draft model.
            loop: of the wire; `on_failed` is called on it.
            on_failed: told once that the engine cannot go on.
            warm_up: the first forwards.
            before_start: what the thread needs before that.
        """
        self.snapshot = EngineSnapshot(num_kv_blocks=pool.num_blocks, num_free_kv_blocks=pool.num_free)
        self.thread = EngineThread(
            self, name="speculator engine", loop=loop, on_failed=on_failed, before_start=before_start
        )
        self._receivers: dict[int, Receiver] = {}  # touched by the event loop alone
        self._to_loop = Outbox(loop, self._deliver)
        self._metrics = metrics
        self._drafter = make_drafter()
        self._pool = pool
        self._warm_up = warm_up
        self._averages = (0.0, 0.0)
        self._snapshot_s = -math.inf
        self._has_news = False
        """Whether the last step is still to be reported."""
        self._seen_counters = (0, 0, 0, 0, 0, 0)
        self._seen_refusals = Counter[Reason]()

    # ---- called by the wire ---------------------------------------------------------------------------------

    def connect(self, connection: int, vocab_size: int, receiver: Receiver) -> None:
        """Register a target whose stream was acknowledged; responses go to `receiver`, on the event loop."""
        self._receivers[connection] = receiver
        self.thread.call(lambda: self._drafter.held.connect(connection, vocab_size))

    def submit(self, connection: int, request: speculator_pb2.SpeculateRequest) -> None:
        """Take in a message of a target."""
        received_s = time.monotonic()
        self.thread.call(lambda: self._drafter.held.apply(connection, request, received_s))

    def set_channel(self, connection: int, channel: Channel) -> None:
        """Have dense distributions sent to a target through `channel`, a process group that is up."""
        self.thread.call(lambda: self._drafter.held.set_channel(connection, channel))

    def drop_channel(self, connection: int, channel: Channel) -> None:
        """Stop using a channel that is lost or closed."""
        self.thread.call(lambda: self._drafter.held.drop_channel(connection, channel))

    def disconnect(self, connection: int) -> None:
        """Free everything of a target whose stream ended."""
        self._receivers.pop(connection, None)
        self.thread.call(lambda: self._drafter.held.disconnect(connection))

    def _deliver(self, items: list[tuple[int, list[speculator_pb2.SpeculateResponse]]]) -> None:
        for connection, responses in items:
            receiver = self._receivers.get(connection)
            if receiver is not None:
                receiver.send(*responses)

    # ---- the loop, see `Engine` -----------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run the first forwards, and show in status what is known before the first step."""
        self._warm_up()
        self._update_snapshot()

    def step(self) -> bool:
        """Answer who waits, draft, and answer again with what that brought.

        While a forward runs, tables are pushed and the step before is reported: nothing of it is waited for.
        """
        self._answer()
        worked = self._drafter.step(self._tell)
        if worked:
            self._answer()
            self._has_news = True
        else:
            self._tell()
            self._update_snapshot()
            self._report_idle()
        return worked

    def _tell(self) -> None:
        """Push what the last step brought, and report it."""
        self._drafter.push_tables()
        self._flush()
        if self._has_news:
            self._has_news = False
            self._report_step()
        now_s = time.monotonic()
        if now_s - self._snapshot_s >= _SNAPSHOT_S or self.snapshot.num_sequences != len(self._drafter.held):
            self._update_snapshot()

    def seconds_to_deadline(self) -> float | None:
        """Seconds until a waiting target must have its answer; None if nobody waits."""
        deadline_s = self._drafter.held.next_deadline_s()
        return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())

    def _answer(self) -> None:
        self._drafter.answer_requests(time.monotonic())
        self._flush()

    def _flush(self) -> None:
        for item in self._drafter.held.outbox.take().items():
            self._to_loop.put(item)
        self._to_loop.flush()

    def _report_step(self) -> None:
        step, counters = self._drafter.last_step, self._drafter.held.counters
        seen = (
            counters.num_table_entries, counters.num_dropped_branches, counters.num_stale, counters.num_resyncs,
            counters.num_prefix_queried_tokens, counters.num_prefix_hit_tokens,
        )  # fmt: skip
        gained = [now - before for now, before in zip(seen, self._seen_counters, strict=True)]
        self._seen_counters = seen
        step.num_table_entries, step.num_dropped_branches, step.num_stale_messages, num_resyncs, *prefix = gained
        step.num_prefix_queried_tokens, step.num_prefix_hit_tokens = prefix
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
        self._snapshot_s = time.monotonic()
        estimates = self._drafter.estimates[VerificationMode.GREEDY]
        old, law = self.snapshot, self.snapshot.miss_power_law
        # A fit is too dear for every step: when sequences come and go is often enough.
        if old.num_sequences != len(self._drafter.held) or not law:
            fits = [(fitted.constant, fitted.exponent) for fitted in estimates.miss_laws]
            law = (*fits[0], *fits[1])
            self._metrics.set_estimates(estimates.acceptance, {"rejection": fits[0], "acceptance": fits[1]})
        self.snapshot = EngineSnapshot(
            num_sequences=len(self._drafter.held),
            num_targets=self._drafter.held.num_targets,
            num_kv_blocks=old.num_kv_blocks,
            num_free_kv_blocks=self._pool.num_free,
            rows_per_step=self._averages[0],
            step_ms=self._averages[1],
            num_prefix_queried_tokens=self._drafter.held.counters.num_prefix_queried_tokens,
            num_prefix_hit_tokens=self._drafter.held.counters.num_prefix_hit_tokens,
            acceptance_rate=estimates.acceptance,
            miss_power_law=law,
            confidence_spread=estimates.calibration.confidence_spread,
            explanation=self._explain_rows(),
            refusals=self._report_refusals(),
        )

    def _report_refusals(self) -> Mapping[Reason, int]:
        counts, seen = self._drafter.held.refusals.counts, self._seen_refusals
        if counts == seen:
            return self.snapshot.refusals
        for reason, num_sequences in (counts - seen).items():
            self._metrics.refused(label(reason), num_sequences)
        self._seen_refusals = counts.copy()
        return dict(counts)

    def _explain_rows(self) -> str:
        time = self._drafter.step_time
        calibration = self._drafter.estimates[VerificationMode.GREEDY].calibration
        return (
            f"a step takes {time.base_s * 1e3:.1f} ms and {time.per_row_s * 1e3:.2f} ms per row, "
            f"{self._averages[0]:.1f} rows on average; the draft's scores count {calibration.slope:.2f} times, "
            f"its first rank {calibration.lift:+.2f} more, {calibration.outside:.1%} of tokens are outside its ranks"
        )
