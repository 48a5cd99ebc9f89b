"""How far an engine waits for a speculator, after what its earlier waits brought."""

from __future__ import annotations

import pytest

from specpool.speculation.measurements import Measurements
from specpool.speculation.trust import WaitTrust
from specpool.v1 import types_pb2

WAITED_S = 0.05
PAUSE_S = 100 * WAITED_S


@pytest.fixture
def clock(monkeypatch):
    """What `perf_counter` says."""
    now = [100.0]
    monkeypatch.setattr("specpool.speculation.trust.time.perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.fixture
def measured(clock):
    return Measurements()


@pytest.fixture
def trust(measured):
    return WaitTrust(measured)


def test_a_silent_speculator_is_waited_for_again_when_it_speaks(trust, measured):
    trust.timed_out()
    assert not trust.may_wait()
    assert not trust.may_wait_after_miss()
    assert not trust.may_wait_for_distributions()
    measured.num_received += 1
    assert trust.may_wait()


def test_waits_that_bring_nothing_take_a_hundredth_of_the_time(trust, clock):
    trust.wasted(WAITED_S)
    assert trust.may_wait(), "mode sd has no other source of drafts"
    assert not trust.may_wait_after_miss()
    clock(PAUSE_S - 0.01)
    assert not trust.may_wait_after_miss()
    clock(0.02)
    assert trust.may_wait_after_miss()


def test_wasted_waits_of_several_sequences_add_up(trust, clock):
    trust.wasted(WAITED_S)
    trust.wasted(WAITED_S)
    clock(PAUSE_S + 0.01)
    assert not trust.may_wait_after_miss()
    clock(PAUSE_S)
    assert trust.may_wait_after_miss()


def test_late_distributions_stop_waits_for_distributions_alone(trust, measured, clock):
    trust.distributions_late(WAITED_S)
    measured.num_received += 1
    assert trust.may_wait_after_miss()
    assert not trust.may_wait_for_distributions()
    clock(PAUSE_S + 0.01)
    assert trust.may_wait_for_distributions()


@pytest.mark.parametrize("step_ms", [float("nan"), float("inf"), -1.0])
def test_nonsense_in_a_report_is_no_measurement(measured, step_ms):
    measured.take_load(types_pb2.Load(step_ms=step_ms), 0)
    assert measured.draft_step_s == 0
