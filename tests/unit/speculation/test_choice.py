"""Which speculator a sequence gets, and when it moves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from specpool.speculation.choice import Candidate, choose, is_worth_moving

BASE = Candidate(address="a:1", num_sequences=0, row_budget=64)
candidates = st.builds(
    Candidate,
    address=st.sampled_from(["a:1", "b:1", "c:1"]),
    num_sequences=st.integers(0, 200),
    row_budget=st.integers(1, 256),
    num_labels_apart=st.integers(0, 3),
    round_trip_s=st.floats(0, 0.2),
    has_free_kv=st.booleans(),
)


def spread(num_engines, *places):
    return {choose(places, f"engine {i}").address for i in range(num_engines)}


def test_engines_spread_over_idle_speculators_and_each_keeps_to_one():
    places = [BASE, replace(BASE, address="b:1"), replace(BASE, address="c:1")]
    assert spread(50, *places) == {"a:1", "b:1", "c:1"}
    favourite = choose(places, "me")
    others = [place for place in places if place is not favourite]
    assert choose([replace(favourite, num_sequences=4), *others], "me").address == favourite.address
    assert choose([replace(favourite, num_sequences=5), *others], "me").address != favourite.address


def test_the_one_with_more_rows_takes_more():
    assert spread(
        20, replace(BASE, num_sequences=10), replace(BASE, address="b:1", num_sequences=10, row_budget=16)
    ) == {"a:1"}


def test_near_beats_far_unless_it_is_busy():
    far = replace(BASE, address="b:1", num_labels_apart=1, num_sequences=10)
    assert spread(20, replace(BASE, num_sequences=10), far) == {"a:1"}
    assert spread(20, replace(BASE, num_sequences=40), far) == {"b:1"}
    slow = replace(BASE, address="b:1", round_trip_s=0.045, num_sequences=10)
    assert spread(20, replace(BASE, num_sequences=12), slow) == {"a:1"}


def test_what_is_full_is_never_chosen():
    full = replace(BASE, num_sequences=8, max_sequences=8)
    assert choose([full], "me") is None
    assert choose([full, replace(BASE, address="b:1", num_sequences=100)], "me").address == "b:1"
    assert choose([], "me") is None


def test_memory_that_is_used_up_repels():
    assert spread(20, replace(BASE, has_free_kv=False), replace(BASE, address="b:1", num_sequences=2)) == {"b:1"}


@given(candidates, candidates)
def test_whoever_has_moved_does_not_move_back(current, other):
    """Hysteresis, whatever the two are: after the move the way back is not worth it."""
    if current.num_sequences and is_worth_moving(current, other):
        left = replace(current, num_sequences=current.num_sequences - 1)
        joined = replace(other, num_sequences=other.num_sequences + 1)
        assert not is_worth_moving(joined, left)
