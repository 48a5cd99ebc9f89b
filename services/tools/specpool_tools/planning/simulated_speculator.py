"""The speculator of a simulation: the real drafter, with steps that take virtual time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from specpool.algorithm.row_times import RowTimes
from specpool.v1 import speculator_pb2
from specpool_speculator.config import FanOutPolicy, SpeculatorConfig
from specpool_speculator.engine.drafter import Drafter
from specpool_tools.planning.clock import Clock
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.text import VOCAB_SIZE, SimulatedModel, SimulatedRanker, SimulatedText

Request = speculator_pb2.SpeculateRequest
Receives = Callable[[list[speculator_pb2.SpeculateResponse]], None]
_STEP_SMOOTHING = 0.1


class _FixedTime(RowTimes):
    """Step times of the profile, instead of those fitted to the time that the simulation takes."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn nothing."""

    def __call__(self, num_rows: int) -> float:
        profile = self._profile
        num_paid = max(0, num_rows - profile.draft_free_rows)
        return (profile.draft_step_ms + profile.draft_row_ms * num_paid) / 1e3


class SimulatedSpeculator:
    """The engine's loop, with steps that take virtual time."""

    def __init__(self, clock: Clock, profile: Profile, text: SimulatedText) -> None:
        config = SpeculatorConfig(
            model="simulated",
            row_budget=profile.row_budget,
            fan_out_budget=profile.fan_out,
            fan_out_policy=cast(FanOutPolicy, profile.fan_out_policy),
            max_lookahead=profile.lookahead,
            max_sequences=1 << 20,
        )
        self._clock = clock
        self._half_trip_s = profile.round_trip_ms / 2e3
        self._targets: dict[int, Receives] = {}
        self.drafter = Drafter(
            SimulatedModel(),
            config,
            ranker=SimulatedRanker(text, profile.fan_out + 1),
            step_time=_FixedTime(profile),
        )
        self._inbox: list[tuple[int, Request, float]] = []
        self._is_busy = False
        self.usual_step_s = self.drafter.step_time(1)
        """Seconds of a step with one row, which targets hear of."""
        self.reset()

    def reset(self) -> None:
        """Count from now on, so that the warm-up is left out."""
        self.num_rows = self.num_steps = 0
        self.busy_s = 0.0

    def connect(self, connection: int, receive: Receives) -> None:
        """Connect a target, and what takes its answers."""
        self._targets[connection] = receive
        self.drafter.held.connect(connection, VOCAB_SIZE)

    def receive(self, connection: int, request: Request) -> None:
        """Take in a message that arrived; a running step is not interrupted."""
        self._inbox.append((connection, request, self._clock.now_s))
        if not self._is_busy:
            self._loop()

    def _loop(self) -> None:
        for connection, request, received_s in self._inbox:
            self.drafter.held.apply(connection, request, received_s)
        self._inbox.clear()
        self._answer()
        self._is_busy = self.drafter.step()
        if self._is_busy:
            num_rows = self.drafter.last_step.num_rows
            step_s = self.drafter.step_time(num_rows)
            self.num_steps += 1
            self.num_rows += num_rows
            self.busy_s += step_s
            self.usual_step_s += _STEP_SMOOTHING * (step_s - self.usual_step_s)
            self._clock.after(step_s, self._end_step)

    def _end_step(self) -> None:
        self._answer()
        self._loop()

    def _answer(self) -> None:
        self.drafter.answer(self._clock.now_s)
        for connection, responses in self.drafter.held.outbox.take().items():
            self._clock.after(self._half_trip_s, partial(self._targets[connection], responses))
