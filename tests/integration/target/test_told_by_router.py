"""A router's directory at work: the speculator of a running request is replaced at another address, and it finds it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from specpool.discovery.discovery import Discovery, Endpoint, StaticDiscovery
from specpool.errors import ConfigError
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster

WAIT_S = 60


class Settable(Discovery):
    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def set(self, endpoints: Iterable[Endpoint]) -> None:
        self._publish(endpoints)


async def test_a_running_request_moves_to_the_replacement_that_the_router_names(target_for, speculator_for) -> None:
    """The router would ask for the next status in an hour: it tells of a change at once."""
    target = await target_for("toy#vocab=24,seed=3,step_ms=20,context=4096", num_kv_blocks=2048)
    first = await speculator_for()
    speculators = Settable()
    cluster = Cluster(StaticDiscovery([target.endpoint]), speculators, RouterMetrics(), poll_interval_s=3600)
    await cluster.start()
    try:
        speculators.set([Endpoint(first.endpoint)])
        running = asyncio.create_task(target.generate(mode="ssd", max_tokens=2000))
        async with asyncio.timeout(WAIT_S):
            while first.seen["outcomes"] < 5:
                await asyncio.sleep(0.005)
        second = await speculator_for()
        speculators.set([Endpoint(first.endpoint, terminating=True), Endpoint(second.endpoint)])
        async with asyncio.timeout(WAIT_S):
            while second.seen["outcomes"] < 5:
                assert not running.done()
                await asyncio.sleep(0.005)
            while first.live:
                await asyncio.sleep(0.005)
        assert target.paired[-2:] == [first.endpoint, second.endpoint]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    finally:
        await cluster.close()


async def test_a_directory_that_cannot_be_asked_ends_the_start(target_for, monkeypatch) -> None:
    """No silent downgrade: a target that would never find a speculator says so."""
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="neither a service account nor a kubeconfig"):
        await target_for(speculators="kubernetes:ns/app=speculator")
