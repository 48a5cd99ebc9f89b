"""Starts the system under test as a user would, with `specpool up`, and stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from specpool.errors import Internal


@contextmanager
def running_system(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> Iterator[str]:
    """The endpoint of a fresh `specpool up ARGUMENTS`, which hands `environment` on; see `running_service`."""
    with running_service(("up", *arguments), environment=environment, timeout_s=timeout_s) as endpoint:
        yield endpoint


@contextmanager
def running_service(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> Iterator[str]:
    """The endpoint of a fresh `specpool ARGUMENTS`, which is stopped on leaving.

    `environment` is added to this process's own.

    Raises `Internal` with the end of its log when it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="specpool-bench-") as folder:
        ready, log = Path(folder, "ready"), Path(folder, "log")
        # Through the shim, so that it ends with us even if we are killed.
        command = [sys.executable, "-m", "specpool_tools.local.shim", str(os.getpid())]
        command += [sys.executable, "-m", "specpool_tools.cli.main", *arguments, f"--ready-file={ready}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            yield _wait_ready(arguments[0], process, ready, log, timeout_s)
        finally:
            _stop(process)


def _wait_ready(name: str, process: subprocess.Popen[bytes], ready: Path, log: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ready.exists():
            return ready.read_text().strip()
        if process.poll() is not None:
            break
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise Internal(f"`specpool {name}` did not become ready within {timeout_s:.0f} s; its last lines:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
