"""How long a stream looks for a target, and what it says when there is none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from specpool import errors
from specpool_router.generation.stop_signal import StopSignal
from specpool_router.generation.target_run import TargetRefused
from specpool_router.generation.target_search import TargetSearch, wait_for_model
from specpool_router.placement.pod_choice import Candidate


class Targets:
    """Pods that never change."""

    def __init__(self, *addresses: str, model: str = "m") -> None:
        self._known = [Candidate(endpoint=each, model=model, num_sequences=0, available=True) for each in addresses]

    def candidates(self) -> list[Candidate]:
        return self._known

    def get(self, address: str) -> Any:
        return SimpleNamespace(endpoint=SimpleNamespace(address=address))

    def mark_lost(self, pod: Any, error: str) -> None:
        pass

    def served_lately(self, model: str) -> bool:
        return True

    async def wait_for_change(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


def search_in(targets: Targets, *, model: str = "m", wait_s: float = 0.0) -> TargetSearch:
    cluster: Any = SimpleNamespace(targets=targets)
    return TargetSearch(
        cluster, StopSignal(), model=model, session_id="", is_new=False, request_wait_s=0.0, failover_wait_s=wait_s
    )


async def tries(search: TargetSearch, tried: list[str] | None = None, *, refused_after_s: float = 0.0) -> None:
    for _ in range(100):
        target = await search.next()
        assert target is not None
        if tried is not None:
            tried.append(target.endpoint.address)
        await asyncio.sleep(refused_after_s)
        search.refused(target, TargetRefused(errors.Draining("not here"), ran=True), progressed=False)


async def test_refusals_that_take_their_time_do_not_go_on_for_ever() -> None:
    """While the last ones refuse, the first may be tried again: there is always one."""
    search = search_in(Targets(*"abcdefgh"), wait_s=0.5)
    with pytest.raises(errors.Draining, match="not here"):
        await tries(search, refused_after_s=0.15)


async def test_every_target_is_tried_once_where_nothing_is_waited_for() -> None:
    tried: list[str] = []
    with pytest.raises(errors.Draining, match="not here"):
        await tries(search_in(Targets(*"abc")), tried)
    assert tried == ["a", "b", "c"]


async def test_a_model_whose_targets_have_gone_is_unavailable_and_not_unknown() -> None:
    """NOT_FOUND would tell the client of a half-delivered stream that it is of no use to come back."""
    with pytest.raises(errors.TargetUnavailable, match="no target for model 'm'"):
        await search_in(Targets("a", model="another")).next()


async def test_a_request_that_waits_for_a_model_is_told_that_the_router_stops() -> None:
    cluster: Any = SimpleNamespace(targets=Targets())
    stop = StopSignal()
    waiting = asyncio.create_task(wait_for_model(cluster, stop, "m", wait_s=60.0))
    await asyncio.sleep(0)
    stop.drain()
    with pytest.raises(errors.Draining) as caught:
        await asyncio.wait_for(waiting, 30)
    assert caught.value.metadata["retriable"] == "true"
