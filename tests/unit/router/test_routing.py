"""Choice of the target."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specpool.errors import ModelNotFound, TargetUnavailable
from specpool_router.placement.pod_choice import Candidate, choose_target, resolve_model


def pod(endpoint: str, num_sequences: int = 0, *, model: str = "m", available: bool = True) -> Candidate:
    return Candidate(
        endpoint=endpoint,
        model=model,
        num_sequences=num_sequences,
        available=available,
    )


def test_least_busy_target_of_the_model() -> None:
    pods = [pod("a", 3), pod("b", 1), pod("c", 0, model="other"), pod("d", 0, available=False)]
    assert choose_target(pods, model="m").endpoint == "b"
    assert choose_target(pods, model="m", exclude={"b"}).endpoint == "a"


def test_a_terminating_target_is_better_than_none() -> None:
    leaving = replace(pod("a", 0), is_leaving=True)
    assert choose_target([leaving, pod("b", 50)], model="m").endpoint == "b"
    assert choose_target([leaving, pod("b", available=False)], model="m") == leaving
    assert choose_target([leaving], model="m", session_id="s") == leaving


def test_session_keeps_its_target_until_that_is_much_busier() -> None:
    pods = [pod(name) for name in "abcdef"]
    home = choose_target(pods, model="m", session_id="s").endpoint
    busy = [pod(p.endpoint, 4 if p.endpoint == home else 0) for p in pods]
    assert choose_target(busy, model="m", session_id="s").endpoint == home
    busier = [pod(p.endpoint, 5 if p.endpoint == home else 0) for p in pods]
    assert choose_target(busier, model="m", session_id="s").endpoint != home


def test_a_target_that_goes_moves_only_its_own_sessions() -> None:
    pods = [pod(name) for name in "abcdef"]
    before = {s: choose_target(pods, model="m", session_id=s).endpoint for s in map(str, range(200))}
    after = {s: choose_target(pods[1:], model="m", session_id=s).endpoint for s in before}
    assert len(set(before.values())) == 6
    assert {s for s in before if before[s] != after[s]} == {s for s in before if before[s] == "a"}


def test_model_errors() -> None:
    pods = [pod("a"), pod("b", model="n")]
    with pytest.raises(ModelNotFound, match="served: m, n"):
        resolve_model(pods, "x")
    with pytest.raises(ModelNotFound, match="names no model and several are served"):
        resolve_model(pods, "")
    assert resolve_model(pods[:1], "") == "m"
    with pytest.raises(TargetUnavailable, match="no target for model 'm'"):
        choose_target([pod("a", available=False)], model="m")
    with pytest.raises(TargetUnavailable, match="no target for model 'm'"):
        choose_target([pod("a", model="n")], model="m")
    with pytest.raises(TargetUnavailable, match="any model yet"):
        resolve_model([pod("a", model="", available=False)], "m")
