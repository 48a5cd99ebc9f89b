"""Starts whole systems with `specpool up`, as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SPECPOOL = (sys.executable, "-m", "specpool_tools.cli.main")
READY_S = 180.0
"""Three processes import torch first, maybe on a busy machine."""


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return value


class System:
    """One `specpool up`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ready_file, self.logs, self._output = folder / "ready", folder / "logs", folder / "output"
        self.mark = f"specpool-e2e-{os.getpid()}-{time.monotonic_ns()}"
        self.environment = {
            **os.environ,
            "SPECPOOL_RUNTIME_DIR": str(folder / "run"),
            "SPECPOOL_TEST_MARK": self.mark,  # found in /proc of every process that descends from this one
        }
        self.environment.pop("SPECPOOL_ENDPOINT", None)
        command = [*SPECPOOL, "up", "--ready-file", str(self.ready_file), "--log-dir", str(self.logs), *arguments]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_ready(self) -> str:
        def ready() -> bool:
            assert self.process.poll() is None, f"it ended: {self.output}"
            return self.ready_file.exists()

        wait_until(ready, READY_S, "specpool up becomes ready")
        return self.ready_file.read_text().strip()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SPECPOOL, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )

    def generate(self, prompt: str, *arguments: str) -> dict[str, Any]:
        result = self.run("generate", prompt, "--output", "json", *arguments)
        assert result.returncode == 0, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    def status(self) -> dict[str, Any]:
        result = self.run("status", "--output", "json")
        assert result.returncode == 0, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    def processes(self) -> list[int]:
        """Everything that descends from this `up`, also what was orphaned; zombies do not count."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                # Valkey overwrites its environment with a title, the guardian has a session of its own.
                marked = self.mark.encode() in (entry / "environ").read_bytes()
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and (marked or int(session) == self.process.pid):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def pid_of(self, name: str) -> int:
        """Of one of its processes, by its id flag."""
        for pid in self.processes():
            if f"--id={name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"{name} does not run")

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_system(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """`start_system(*arguments of up)`; stopped at the end whatever happens."""
    systems: list[System] = []

    def start(*arguments: str) -> System:
        systems.append(System(tmp_path / f"system-{len(systems)}", *arguments))
        return systems[-1]

    yield start
    for system in systems:
        system.stop()


@pytest.fixture(scope="module")
def toy_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Two targets and one speculator on toy models whose forwards take a while, so that drafting fits into one."""
    system = System(
        tmp_path_factory.mktemp("toy"),
        *("--target", "toy#vocab=64,seed=3,step_ms=60", "--draft", "toy#vocab=64,seed=3,agreement=0.9,step_ms=3"),
        *("--targets", "2", "--lookahead", "3"),
    )
    try:
        system.wait_ready()
        yield system
    finally:
        system.stop()
