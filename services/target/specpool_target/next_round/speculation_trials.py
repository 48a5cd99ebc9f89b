"""Whether speculation pays, judged by what comes out: tokens of whole batches per second, beside plain decoding.

A trial is kept for every mode and size of batch, up to a power of two. It settles until drafts arrive, counts, and
where speculation seems slower than plain decoding is thought to be, checks with a few plain steps. If it is slower,
speculation pauses and is then tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from specpool_target.engine.sequence import SpeculationMode

_MAX_SETTLING: Final = 64
"""Most steps that a trial settles for; a speculator that has not caught up by then is judged as it is."""
_STEPS_PER_COUNT: Final = 8
_ROUNDS_PER_COUNT: Final = 48
_FAILED_COUNTS: Final = 3
"""Counts that have to fail in a row before the check: tokens of a few rounds vary by a tenth."""
_PLAIN_STEPS: Final = 4
_MAX_CHECKING: Final = 16
_TOLERANCE: Final = 0.97
"""Share of the plain speed down to which speculation goes on."""
_LEAST_PAUSE: Final = 512
_TRIAL_SHARE: Final = 0.03
"""Share of the steps that trials which fail may cost."""


class Verdict(StrEnum):
    """What to do in batches of one size."""

    SPECULATE = "speculate"
    PLAIN = "plain"
    """Decode plainly for a few steps; the speculator is kept informed."""
    PAUSE = "pause"
    """Decode plainly for long; no speculator is told of the sequences."""


class _Phase(StrEnum):
    SETTLING = "settling"
    COUNTING = "counting"
    CHECKING = "checking"
    PAUSED = "paused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What one step of a batch brought."""

    batch_size: int
    """Sequences running, those included that wait for a draft."""
    num_rounds: int
    """Sequences verified in the step."""
    num_drafted: int
    """Sequences verified in the step with a draft of the speculator's."""
    num_tokens: int
    seconds: float
    """Seconds since the step before."""


@dataclass(slots=True)
class _Sum:
    num_steps: float = 0
    num_rounds: float = 0
    num_tokens: float = 0
    seconds: float = 0
    plain_steps: float = 0
    """Steps that plain decoding is thought to make in the same time."""

    def add(self, output: Output, plain_s: float) -> None:
        self.num_steps += 1
        self.num_rounds += output.num_rounds
        self.num_tokens += output.num_tokens / output.batch_size
        self.seconds += output.seconds
        self.plain_steps += output.seconds / plain_s if plain_s > 0 else 0.0

    def halve(self) -> None:
        """Halve all sums, so that older steps count less."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) / 2)

    @property
    def speed(self) -> float:
        """Tokens per second of a sequence."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class _Trial:
    def __init__(self) -> None:
        self.phase = _Phase.SETTLING
        self.resume_at = 0
        """Step at which a pause ends."""
        self._num_steps = 0  # of the phase
        self._num_failed = 0
        self._was_checked = False
        self._counted = _Sum()
        self._checked = _Sum()

    def settle(self) -> None:
        """Settle again: drafts are missing for reasons that have nothing to do with the batch."""
        if self.phase is not _Phase.PAUSED:
            self._enter(_Phase.SETTLING)

    def restart(self) -> None:
        """Begin anew after a pause."""
        self._counted, self._num_failed = _Sum(), 0
        self._enter(_Phase.SETTLING)

    def observe(self, output: Output, plain_s: float, step: int) -> None:
        self._num_steps += 1
        match self.phase:
            case _Phase.SETTLING:
                if 2 * output.num_drafted >= output.num_rounds or self._num_steps >= _MAX_SETTLING:
                    self._enter(_Phase.COUNTING)
            case _Phase.COUNTING:
                self._count(output, plain_s)
            case _Phase.CHECKING:
                self._check(output, step)

    def _count(self, output: Output, plain_s: float) -> None:
        counted = self._counted
        counted.add(output, plain_s)
        if self._num_steps < _STEPS_PER_COUNT or counted.num_rounds < _ROUNDS_PER_COUNT:
            return
        failed = counted.num_tokens < _TOLERANCE * counted.plain_steps
        self._num_failed = self._num_failed + 1 if failed else 0
        if self._num_failed >= _FAILED_COUNTS or not self._was_checked:
            self._checked = _Sum()
            self._enter(_Phase.CHECKING)
        else:
            counted.halve()
            self._enter(_Phase.COUNTING)

    def _check(self, output: Output, step: int) -> None:
        if output.num_drafted == 0 and output.num_rounds == output.batch_size:
            self._checked.add(output, 0.0)
        if self._checked.num_steps < _PLAIN_STEPS and self._num_steps < _MAX_CHECKING:
            return
        self._was_checked, self._num_failed = True, 0
        if self._checked.num_steps < _PLAIN_STEPS or self._counted.speed >= _TOLERANCE * self._checked.speed:
            self._counted.halve()
            self._enter(_Phase.COUNTING)
            return
        lost_steps = self._counted.seconds * (self._checked.speed - self._counted.speed)  # one token is one plain step
        self.resume_at = step + max(_LEAST_PAUSE, round(lost_steps / _TRIAL_SHARE))
        self._enter(_Phase.PAUSED)

    def _enter(self, phase: _Phase) -> None:
        self.phase, self._num_steps = phase, 0


class SpeculationTrials:
    """The trials of one target, by mode and size of batch."""

    def __init__(self, plain_s: Callable[[int], float]) -> None:
        """`plain_s` gives the seconds that a forward of one token per sequence is thought to take."""
        self._plain_s = plain_s
        self._trials: dict[tuple[SpeculationMode, int], _Trial] = {}
        self._last: _Trial | None = None
        self._step = 0

    def verdict(self, mode: SpeculationMode, batch_size: int) -> Verdict:
        """What the next round of sequences in this mode and size of batch does."""
        trial = self._trial(mode, batch_size)
        if trial.phase is _Phase.PAUSED:
            return Verdict.PAUSE
        return Verdict.PLAIN if trial.phase is _Phase.CHECKING else Verdict.SPECULATE

    def end_step(self) -> None:
        """Count one more step, of whatever batch; pauses whose time has come end."""
        self._step += 1
        for trial in self._trials.values():
            if trial.phase is _Phase.PAUSED and self._step >= trial.resume_at:
                trial.restart()

    def observe(self, mode: SpeculationMode, output: Output) -> None:
        """Take in a step of a batch whose sequences all leave K to the target and are known to a speculator."""
        trial = self._trial(mode, output.batch_size)
        if trial is not self._last:
            trial.settle()
        self._last = trial
        trial.observe(output, self._plain_s(output.batch_size), self._step + 1)

    @property
    def is_pausing(self) -> bool:
        """Whether speculation pauses in the batches that ran last."""
        return self._last is not None and self._last.phase is _Phase.PAUSED

    def forget(self) -> None:
        """Forget all trials: another speculator is there."""
        self._trials.clear()
        self._last = None

    def paused(self) -> list[str]:
        """The batches that are decoded plainly, in words, for status."""
        sizes = sorted(key for key, trial in self._trials.items() if trial.phase is _Phase.PAUSED)
        return [f"{mode.value} paused in batches of {1 << bits >> 1} to {(1 << bits) - 1}" for mode, bits in sizes]

    def _trial(self, mode: SpeculationMode, batch_size: int) -> _Trial:
        return self._trials.setdefault((mode, batch_size.bit_length()), _Trial())
