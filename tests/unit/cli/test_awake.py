"""Spinning processes of the lowest priority, one on each core, that end with whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specpool.errors import ConfigError
from specpool_tools.bench import machine
from specpool_tools.local import up_config
from specpool_tools.local.awake import awake_command, can_keep_awake, cores_awake
from specpool_tools.local.processes import lay_out
from specpool_tools.local.up_config import UpConfig

pytestmark = pytest.mark.skipif(not can_keep_awake(), reason="needs Linux's idle scheduling class")
CORE = min(os.sched_getaffinity(0)) if can_keep_awake() else 0


def spinners_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            is_spinner = os.sched_getscheduler(pid) == os.SCHED_IDLE and os.sched_getaffinity(pid) == {CORE}
        except (FileNotFoundError, ProcessLookupError):
            continue
        if is_spinner and int(fields[1]) == parent:
            found.append(pid)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_core_is_awake_as_long_as_asked() -> None:
    with cores_awake([CORE]):
        wait_for(lambda: len(spinners_of(os.getpid())) == 1)
    assert spinners_of(os.getpid()) == []


def test_a_spinner_ends_when_its_parent_is_killed() -> None:
    code = (
        f"import time; from specpool_tools.local.awake import cores_awake\nwith cores_awake([{CORE}]): time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        wait_for(lambda: len(spinners_of(parent.pid)) == 1)
        (pid,) = spinners_of(parent.pid)
        parent.kill()
        wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_up_keeps_the_cores_of_its_engines_awake_and_stops_that_last(tmp_path: Path) -> None:
    config = UpConfig(target="toy", draft="toy", affinity="target=0-1;speculator=3", keep_awake=True)
    made = lay_out(config, settings_file=None, run_directory=tmp_path)
    assert [child.command[-1] for child in made.awake] == ["0", "1", "3"]
    assert made.children[-3:] == made.awake
    assert made.stop_stages[-1] == ("awake-0", "awake-1", "awake-3")
    assert lay_out(UpConfig(target="toy"), settings_file=None, run_directory=tmp_path).awake == ()


def test_where_it_cannot_be_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_config, "can_keep_awake", lambda: False)
    with pytest.raises(ConfigError, match="keep_awake needs Linux"):
        UpConfig(target="toy", keep_awake=True)


@pytest.mark.parametrize("is_virtual", [True, False])
def test_demo_and_bench_ask_for_it_in_virtual_machines(monkeypatch: pytest.MonkeyPatch, is_virtual: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(machine, "has_cpu_quota", lambda: False)
    monkeypatch.setattr(machine, "is_virtual", lambda: is_virtual)
    assert ("--keep-awake" in machine.recommended_arguments()) is is_virtual


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cpu.max", "max 100000\n", False),
        ("cpu.max", "200000 100000\n", True),
        ("cpu/cpu.cfs_quota_us", "-1\n", False),
        ("cpu/cpu.cfs_quota_us", "150000\n", True),
        ("other", "", False),
    ],
)
def test_a_cpu_quota_is_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str, expected: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert machine.has_cpu_quota(tmp_path) is expected
    monkeypatch.setattr(machine, "is_virtual", lambda: True)
    monkeypatch.setattr(machine, "has_cpu_quota", lambda: expected)
    assert machine.should_keep_awake() is not expected


def test_a_core_that_is_not_there_is_said_and_ends_nothing() -> None:
    with subprocess.Popen(awake_command(4095), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("core 4095 is not kept awake: ")
        assert process.poll() is None
        process.terminate()
