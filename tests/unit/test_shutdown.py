"""Processes that are told to stop and hang."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from specpool.shutdown import STUCK_EXIT_STATUS, close_within

_SERVICE = """
import asyncio, sys, threading, time
from specpool import shutdown
shutdown.EXIT_S = 1.0

async def hangs_in_its_stop():
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

async def serve(stop):
    print("ready", flush=True)
    await stop.wait()
    if sys.argv[1] == "task":
        leftover = asyncio.create_task(hangs_in_its_stop())
        await asyncio.sleep(0.1)
    elif sys.argv[1] == "loop":
        time.sleep(600)
    elif sys.argv[1] == "executor":
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
        await asyncio.sleep(0.1)
    elif sys.argv[1] == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start()

async def main():
    stop = shutdown.StopEvent(drain_grace_s=0.5)
    asyncio.get_running_loop().add_reader(0, stop.set)  # end of standard input
    await serve(stop)
asyncio.run(main())
"""


@pytest.mark.parametrize("hanging", ["task", "loop", "executor", "thread", "nothing"])
def test_a_process_ends_whatever_hangs_in_its_stop(hanging: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVICE, hanging],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.close()
        try:
            status = process.wait(60)
        finally:
            process.kill()
        assert process.stderr is not None
        said = process.stderr.read()
    if hanging == "nothing":
        assert (status, said) == (0, "")
    else:
        assert status == STUCK_EXIT_STATUS
        assert "most recent call first" in said
    assert ("hangs_in_its_stop" in said) == (hanging == "task")


async def test_parts_are_closed_side_by_side_and_named_when_they_are_not(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    async def well() -> None:
        closed.append("well")

    async def badly() -> None:
        raise OSError("gone")

    started = time.monotonic()
    await close_within(0.2, first=asyncio.sleep(600), second=well(), third=badly())
    assert time.monotonic() - started < 5
    assert closed == ["well"]
    assert "first did not close within 0.2 s" in caplog.text
    assert "closing third failed" in caplog.text
    assert "OSError: gone" in caplog.text
