"""When a target stops speculating, and when it tries again."""

from __future__ import annotations

from collections.abc import Callable

from specpool_target.engine.sequence import SpeculationMode
from specpool_target.next_round.speculation_trials import Output, SpeculationTrials, Verdict

SSD, SD = SpeculationMode.SSD, SpeculationMode.SD
PLAIN_S = 0.100
BATCH = 4


class Target:
    """Runs rounds as the trials want them: a plain step takes `PLAIN_S`, a speculative one what it is told."""

    def __init__(self, thought_s: float = PLAIN_S) -> None:
        self.trials = SpeculationTrials(lambda batch_size: thought_s)
        self.verdicts: list[Verdict] = []

    def run(
        self, num_steps: int, tokens: float | Callable[[int], float], *, batch_size: int = BATCH, drafted: bool = True
    ) -> list[Verdict]:
        """Steps in which speculation brings `tokens` per sequence in twice the time of a plain one."""
        verdicts = []
        for step in range(num_steps):
            verdict = self.trials.verdict(SSD, batch_size)
            verdicts.append(verdict)
            each = tokens(step) if callable(tokens) else tokens
            speculates = verdict is Verdict.SPECULATE
            output = Output(
                batch_size=batch_size,
                num_rounds=batch_size,
                num_drafted=batch_size if speculates and drafted else 0,
                num_tokens=round(batch_size * each) if speculates else batch_size,
                seconds=2 * PLAIN_S if speculates else PLAIN_S,
            )
            self.trials.observe(SSD, output)
            self.trials.end_step()
        return verdicts


def test_what_brings_less_than_plain_decoding_pauses_and_is_tried_again() -> None:
    verdicts = Target().run(1000, 1.5)
    first = verdicts.index(Verdict.PAUSE)
    assert first < 40
    assert verdicts[first : first + 512] == [Verdict.PAUSE] * 512
    assert verdicts[first + 512] is Verdict.SPECULATE
    assert Verdict.PAUSE in verdicts[first + 513 :]


def test_what_pays_goes_on_after_one_check() -> None:
    verdicts = Target().run(1000, 2.2)
    assert Verdict.PAUSE not in verdicts
    assert verdicts.count(Verdict.PLAIN) == 4


def test_plain_decoding_is_measured_before_speculation_pauses_for_it() -> None:
    """Thought to take half or twice as long as it does."""
    assert Verdict.PAUSE not in Target(thought_s=PLAIN_S / 2).run(2000, 2.2)
    assert Verdict.PAUSE in Target(thought_s=PLAIN_S * 2).run(100, 1.5)


def test_one_bad_stretch_is_not_enough() -> None:
    target = Target()
    target.run(100, 2.2)
    verdicts = target.run(200, lambda step: 1.0 if step % 48 < 8 else 2.4)
    assert Verdict.PAUSE not in verdicts


def test_a_slow_start_is_not_held_against_speculation_nor_waited_for_without_end() -> None:
    target = Target()
    assert target.run(50, 1.0, drafted=False) == [Verdict.SPECULATE] * 50
    assert Verdict.PAUSE not in target.run(100, 2.2)
    assert Verdict.PAUSE in Target().run(150, 1.0, drafted=False)


def test_sizes_and_modes_are_judged_apart() -> None:
    target = Target()
    target.run(60, 1.5)
    assert [target.trials.verdict(SSD, size) for size in (3, 4, 7, 8)] == [
        Verdict.SPECULATE,
        Verdict.PAUSE,
        Verdict.PAUSE,
        Verdict.SPECULATE,
    ]
    assert target.trials.verdict(SD, 4) is Verdict.SPECULATE
    assert target.trials.is_pausing
    assert target.trials.paused() == ["ssd paused in batches of 4 to 7"]


def test_a_pause_ends_whatever_else_runs() -> None:
    target = Target()
    target.run(60, 1.5)
    for _ in range(520):
        target.trials.end_step()  # of batches in which K was not the policy's choice
    assert target.trials.verdict(SSD, 4) is Verdict.SPECULATE


def test_the_more_a_trial_costs_the_longer_the_pause() -> None:
    verdicts = Target().run(3000, 0.25)
    first = verdicts.index(Verdict.PAUSE)
    pause = verdicts.index(Verdict.SPECULATE, first) - first
    assert pause > 600
    lost = sum(1 - 0.25 / 2 for verdict in verdicts[:first] if verdict is Verdict.SPECULATE)
    assert lost < 0.1 * pause


def test_another_speculator_gets_its_chance_at_once() -> None:
    target = Target()
    target.run(60, 1.5)
    target.trials.forget()
    assert target.trials.verdict(SSD, 4) is Verdict.SPECULATE
