"""How far a target waits for a speculator, after what its earlier waits brought."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from specpool_target.links.link import LinkMeasurements
from specpool_target.links.live_links import LiveLinks

FIRST, SECOND = 1, 2
WAITED_S = 0.05
PAUSE_S = 100 * WAITED_S


@dataclass(eq=False)
class Link:
    """A link as far as trust in it goes."""

    measured: LinkMeasurements = field(default_factory=LinkMeasurements)
    is_connected: bool = True


@pytest.fixture
def clock(monkeypatch):
    """What `perf_counter` says."""
    now = [100.0]
    monkeypatch.setattr("specpool_target.links.live_links.time.perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.fixture
def link(clock):
    return Link()


@pytest.fixture
def links(link):
    links = LiveLinks()
    links.up(link, FIRST)
    return links


def test_only_a_connected_link_is_waited_for(links, link):
    assert links.may_wait(link)
    assert not links.may_wait(Link())
    assert not links.may_wait(None)
    link.is_connected = False
    assert not links.may_wait(link)


def test_a_silent_link_is_waited_for_again_when_it_speaks(links, link):
    links.timed_out(link)
    assert not links.may_wait(link)
    assert not links.may_wait_after_miss(link)
    assert not links.may_wait_for_distributions(link)
    link.measured.num_received += 1
    assert links.may_wait(link)


def test_waits_that_bring_nothing_take_a_hundredth_of_the_time(links, link, clock):
    links.wasted(link, WAITED_S)
    assert links.may_wait(link), "mode sd has no other source of drafts"
    assert not links.may_wait_after_miss(link)
    clock(PAUSE_S - 0.01)
    assert not links.may_wait_after_miss(link)
    clock(0.02)
    assert links.may_wait_after_miss(link)


def test_wasted_waits_of_several_sequences_add_up(links, link, clock):
    links.wasted(link, WAITED_S)
    links.wasted(link, WAITED_S)
    clock(PAUSE_S + 0.01)
    assert not links.may_wait_after_miss(link)
    clock(PAUSE_S)
    assert links.may_wait_after_miss(link)


def test_late_distributions_stop_waits_for_distributions_alone(links, link, clock):
    links.distributions_late(link, WAITED_S)
    link.measured.num_received += 1
    assert links.may_wait_after_miss(link)
    assert not links.may_wait_for_distributions(link)
    clock(PAUSE_S + 0.01)
    assert links.may_wait_for_distributions(link)


def test_a_new_connection_is_given_new_trust(links, link):
    links.timed_out(link)
    links.wasted(link, WAITED_S)
    links.distributions_late(link, WAITED_S)
    links.down(link, FIRST)
    assert links.epoch(link) is None
    links.up(link, SECOND)
    assert links.epoch(link) == SECOND
    assert links.may_wait_after_miss(link)
    assert links.may_wait_for_distributions(link)


def test_the_end_of_an_earlier_connection_does_not_end_a_later_one(links, link):
    links.up(link, SECOND)
    links.down(link, FIRST)
    assert links.epoch(link) == SECOND


def test_what_becomes_known_of_a_lost_link_is_ignored(links):
    lost = Link()
    links.timed_out(lost)
    links.wasted(lost, WAITED_S)
    links.distributions_late(lost, WAITED_S)
    assert links.epoch(lost) is None
