"""Child processes: logs, restarts, graceful and forced stops, and nothing left when the supervisor dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from specpool_tools.local.guardian import Guardian
from specpool_tools.local.supervisor import Child, ChildSpec

SLEEP = (sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(60)")
DEAF = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
)
# Starts a grandchild that ignores everything but SIGKILL, and prints its pid.
WITH_GRANDCHILD = (
    sys.executable,
    "-c",
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)",
)


@pytest.fixture
def guardian() -> Iterator[Guardian]:
    each = Guardian()
    yield each
    each.close()


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_output_goes_to_the_log_and_a_stop_is_graceful(tmp_path: Path, guardian: Guardian) -> None:
    child = Child(ChildSpec(name="sleeper", command=SLEEP), tmp_path, guardian)
    child.start(lambda *_: True)
    await eventually(lambda: child.last_line == "hello")
    pid = child.pid
    assert pid is not None
    assert os.getpgid(pid) == pid, "its own process group: Ctrl-C on the terminal does not reach it"
    await child.stop(5.0)
    assert child.last_exit == -signal.SIGTERM
    assert child.num_starts == 1
    assert not is_running(pid)
    assert f"sleeper[{pid}] hello" in (tmp_path / "sleeper.log").read_text()


async def test_what_ignores_the_request_to_stop_is_killed(tmp_path: Path, guardian: Guardian) -> None:
    child = Child(ChildSpec(name="deaf", command=DEAF), tmp_path, guardian)
    child.start(lambda *_: True)
    await eventually(lambda: child.last_line == "deaf")
    await child.stop(0.2)
    assert child.last_exit == -signal.SIGKILL


async def test_a_crashed_child_starts_again(tmp_path: Path, guardian: Guardian) -> None:
    exits: list[int] = []
    child = Child(ChildSpec(name="sleeper", command=SLEEP), tmp_path, guardian)
    child.start(lambda _, status: not exits.append(status))
    await eventually(lambda: child.last_line == "hello")
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: child.num_starts == 2 and child.pid not in (None, first))
    assert exits == [-signal.SIGKILL]
    await child.stop(5.0)


async def test_a_child_that_may_not_start_again_stays_down(tmp_path: Path, guardian: Guardian) -> None:
    spec = ChildSpec(name="failing", command=(sys.executable, "-c", "import sys; sys.exit('error: X: y')"))
    child = Child(spec, tmp_path, guardian)
    child.start(lambda *_: False)
    await eventually(lambda: child.last_exit is not None)
    assert (child.num_starts, child.last_exit) == (1, 1)
    assert child.log_tail(1)[0].endswith("error: X: y")


async def test_children_of_a_crashed_child_are_killed(tmp_path: Path, guardian: Guardian) -> None:
    child = Child(ChildSpec(name="parent", command=WITH_GRANDCHILD), tmp_path, guardian)
    child.start(lambda *_: False)
    await eventually(lambda: child.last_line.isdigit())
    grandchild = int(child.last_line)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await eventually(lambda: not is_running(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
@pytest.mark.parametrize("is_guardian_lost", [False, True])
async def test_sigkill_of_the_supervisor_leaves_no_process(tmp_path: Path, is_guardian_lost: bool) -> None:
    program = f"""
import asyncio, os, pathlib, sys
from specpool_tools.local.guardian import Guardian
from specpool_tools.local.supervisor import Child, ChildSpec
async def main():
    guardian = Guardian()
    if {is_guardian_lost}:
        os.kill(guardian.pid, 9)
        os.waitid(os.P_PID, guardian.pid, os.WEXITED | os.WNOWAIT)
    child = Child(ChildSpec(name="parent", command={WITH_GRANDCHILD!r}), pathlib.Path({str(tmp_path)!r}), guardian)
    child.start(lambda *_: True)
    while not child.last_line.isdigit():
        await asyncio.sleep(0.02)
    print(child.pid, child.last_line, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(text) for text in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        supervisor.kill()
        await eventually(lambda: not any(is_running(pid) for pid in pids))


async def test_a_killed_guardian_is_replaced(tmp_path: Path, guardian: Guardian) -> None:
    child = Child(ChildSpec(name="sleeper", command=SLEEP), tmp_path, guardian)
    child.start(lambda *_: True)
    await eventually(lambda: child.last_line == "hello")
    first, first_guardian = child.pid, guardian.pid
    assert first is not None
    os.kill(first_guardian, signal.SIGKILL)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: child.num_starts == 2 and child.pid not in (None, first))
    assert guardian.pid != first_guardian
    await child.stop(5.0)


async def test_a_log_that_cannot_be_written_ends_no_child(
    tmp_path: Path, guardian: Guardian, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(tmp_path / "sleeper.log").symlink_to("/dev/full")
    child = Child(ChildSpec(name="sleeper", command=SLEEP), tmp_path, guardian)
    child.start(lambda *_: True)
    await eventually(lambda: child.last_line == "hello")
    await child.stop(5.0)
    assert child.num_starts == 1
    assert capsys.readouterr().err.count("sleeper.log are lost: No space left on device") == 1


async def test_a_child_that_cannot_be_started_is_tried_again(
    tmp_path: Path, guardian: Guardian, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = asyncio.create_subprocess_exec, []

    async def without_memory_once(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        tries.append(args)
        if len(tries) == 1:
            raise OSError(12, "Cannot allocate memory")
        return await real(*args, **kwargs)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", without_memory_once)
    child = Child(ChildSpec(name="sleeper", command=SLEEP), tmp_path, guardian)
    child.start(lambda *_: True)
    await eventually(lambda: child.last_line == "hello")
    await child.stop(5.0)
    assert "error: cannot be started: [Errno 12] Cannot allocate memory" in child.log_path.read_text()
