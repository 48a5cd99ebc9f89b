"""A link to a speculator is kept, whatever happens in it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from specpool.errors import SpecPoolError, SpeculatorUnavailable
from specpool.speculation.link import SpeculatorLink


class Listener:
    def __init__(self) -> None:
        self.failed = asyncio.Event()

    def attempt_failed(self, link: SpeculatorLink) -> None:
        self.failed.set()


async def test_a_defect_does_not_end_the_link_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_attempts = 0

    async def attempt(link: SpeculatorLink, stub: Any) -> SpecPoolError:
        nonlocal num_attempts
        num_attempts += 1
        if num_attempts == 1:
            raise RuntimeError("nobody thought of this")
        return SpeculatorUnavailable("away")

    monkeypatch.setattr(SpeculatorLink, "_attempt", attempt)
    listener = Listener()
    link = SpeculatorLink("127.0.0.1:1", hello=None, listener=listener)  # type: ignore[arg-type]
    await asyncio.wait_for(listener.failed.wait(), 30)
    assert "speculator 127.0.0.1:1: link failed; it starts again" in caplog.text
    assert "nobody thought of this" in caplog.text
    await link.close()


async def test_a_close_that_is_cancelled_leaves_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[asyncio.Event] = []

    async def attempt(link: SpeculatorLink, stub: Any) -> SpecPoolError:
        link.connection = SimpleNamespace(half_close=lambda: None)  # type: ignore[assignment]
        attempts.append(asyncio.Event())
        try:
            await asyncio.Event().wait()
        finally:
            attempts[0].set()
        raise AssertionError

    monkeypatch.setattr(SpeculatorLink, "_attempt", attempt)
    link = SpeculatorLink("127.0.0.1:1", hello=None, listener=Listener())  # type: ignore[arg-type]
    while not attempts:
        await asyncio.sleep(0)
    closing = asyncio.create_task(link.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait_for(attempts[0].wait(), 30)
