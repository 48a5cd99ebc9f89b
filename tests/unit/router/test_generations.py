"""One request's way through the router, where the interleaving is rare."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from specpool.errors import SessionStoreUnavailable
from specpool.v1 import inference_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.generation.admission import Admission
from specpool_router.generation.generations import Generations
from specpool_router.generation.resume_point import ResumePoint
from specpool_router.metrics import RouterMetrics


async def test_a_drain_ends_with_its_grace_whatever_streams_do() -> None:
    """The grace of `DrainRouter` may be shorter than the router's own, which is all that would end it otherwise."""
    nothing: Any = None
    admission = Admission(nothing, RouterMetrics())
    async with admission.stream() as stop:
        await asyncio.wait_for(admission.drain(0.1), 30)
        assert stop.is_set
        assert admission.num_streams == 1


async def test_a_session_that_is_still_to_be_written_is_not_begun_anew() -> None:
    """Its id is in use, which would be the end of a resumption that only has to come again."""

    async def find(request_id: str, tenant: Tenant) -> None:
        raise SessionStoreUnavailable("session 'r' is not written yet; retry")

    metrics = RouterMetrics()
    sessions: Any = SimpleNamespace(find=find, reachable=True)
    unused: Any = None
    generations = Generations(
        admission=Admission(sessions, metrics), cluster=unused, sessions=sessions, metrics=metrics, patience=unused
    )
    point = ResumePoint(request_id="r", request=inference_pb2.GenerateRequest(text="x"))
    with pytest.raises(SessionStoreUnavailable, match="not written yet"):
        await anext(generations.resume(Tenant(name="t"), point))
