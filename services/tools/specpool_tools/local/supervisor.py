"""Child processes of `specpool up`: they die with us, are logged, and restart with backoff."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specpool.backoff import Backoff
from specpool_tools.local.guardian import Guardian, kill_group
from specpool_tools.local.log_file import LogFile

_FIRST_BACKOFF_S = 0.5
_POLL_S = 0.05
_LONGEST_BACKOFF_S = 15.0
_STABLE_AFTER_S = 30.0
_LOG_LINE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """A process to supervise."""

    name: str
    """Name in tables and log lines, and of the log file."""
    command: Sequence[str]
    """Program and arguments."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to our own environment."""
    endpoint: str = ""
    """Address that it will listen on: the same after every restart."""


class Child:
    """One supervised process."""

    def __init__(self, spec: ChildSpec, log_directory: Path, guardian: Guardian) -> None:
        self.spec = spec
        self.log_path = log_directory / f"{spec.name}.log"
        self._log = LogFile(self.log_path)
        self.num_starts = 0
        self.last_line = ""
        self.last_exit: int | None = None
        self._guardian = guardian
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process while it runs."""
        process = self._process
        return process.pid if process and process.returncode is None else None

    def start(self, on_exit: Callable[[Child, int], bool]) -> None:
        """Run the process until stopped. After each exit `on_exit(child, status)` says whether to start it again."""
        self._task = asyncio.create_task(self._run(on_exit), name=self.spec.name)

    async def stop(self, grace_s: float) -> None:
        """Stop the process: SIGTERM, and SIGKILL for the whole group after `grace_s`."""
        self._stopping = True
        if self._task is None:
            return
        if self.pid is None:
            self._task.cancel()  # between two starts
        else:
            os.kill(self.pid, signal.SIGTERM)
        _, pending = await asyncio.wait([self._task], timeout=grace_s)
        if pending and self.pid is not None:
            kill_group(self.pid)
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self, on_exit: Callable[[Child, int], bool]) -> None:
        backoff = Backoff(first_s=_FIRST_BACKOFF_S, longest_s=_LONGEST_BACKOFF_S)
        while not self._stopping:
            started = time.monotonic()
            try:
                status = await self._run_once()
            except OSError as error:  # no memory or descriptors for a process: as if it had ended at once
                status, self.last_line = 1, f"error: cannot be started: {error}"
                self._log.write(self.last_line)
            if self._stopping or not on_exit(self, status):
                return
            if time.monotonic() - started > _STABLE_AFTER_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    async def _run_once(self) -> int:
        # The shim must be forked by the main thread: the kernel's parent is the thread, not the process.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "specpool_tools.local.shim", str(os.getpid())),
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.environment},
            process_group=0,
            limit=_LOG_LINE_LIMIT_BYTES,
        )
        self._guardian.watch(process.pid)
        self._process = process
        self.num_starts += 1
        try:
            await self._copy_log(process)
            self.last_exit = await _exit_status(process)
            return self.last_exit
        finally:
            kill_group(process.pid)  # what it may have started itself
            self._guardian.forget(process.pid)

    async def _copy_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        exited = asyncio.create_task(_exit_status(process))
        self._log.write(f"{self.spec.name} started, pid {process.pid}")
        while line := await self._next_line(process.stdout, exited):
            text = line.decode(errors="replace").rstrip()
            if text:
                self.last_line = text
            self._log.write(f"{self.spec.name}[{process.pid}] {text}")

    async def _next_line(self, stream: asyncio.StreamReader, exited: asyncio.Task[int]) -> bytes:
        """The next line; empty once the process is gone, though its own children may hold the pipe open."""
        line = asyncio.ensure_future(stream.readline())
        await asyncio.wait([line, exited], return_when=asyncio.FIRST_COMPLETED)
        if not line.done():
            await asyncio.wait([line], timeout=0.2)
        if line.done():
            with contextlib.suppress(ValueError):  # a line over the limit
                return line.result()
            return b"(long line dropped)\n"
        line.cancel()
        return b""

    def log_tail(self, num_lines: int = 15) -> list[str]:
        """The last lines of the process's log."""
        if not self.log_path.is_file():
            return []
        return self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]


async def _exit_status(process: asyncio.subprocess.Process) -> int:
    """The exit status, for which `Process.wait` would wait until the process's own children close the output, too."""
    while process.returncode is None:
        await asyncio.sleep(_POLL_S)
    return process.returncode
