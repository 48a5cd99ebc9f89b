"""`python -m specpool_tools.local.guardian`: kills whole process groups once its standard input ends.

The parent-death signal reaches only a supervisor's direct children. The guardian reads the numbers of the process
groups from its supervisor (`+PGID` started, `-PGID` gone) and outlives it by the milliseconds that it needs to kill
what is left of them: children of children too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import IO


class Guardian:
    """The supervisor's handle on the guardian process; one that was lost is replaced when there is news for it."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process = _start()

    @property
    def pid(self) -> int:
        """Id of the guardian process."""
        return self._process.pid

    def watch(self, process_group: int) -> None:
        """Have this process group killed when the supervisor ends."""
        self._groups.add(process_group)
        self._send(f"+{process_group}")

    def forget(self, process_group: int) -> None:
        """Watch a process group no more: it is gone, and its number may be reused."""
        self._groups.discard(process_group)
        self._send(f"-{process_group}")

    def close(self) -> None:
        """End the guardian; what is still watched is killed."""
        _end(self._process)
        for group in self._groups:  # the guardian may have been lost
            kill_group(group)

    def _send(self, line: str) -> None:
        try:
            _write(self._process, line)
        except BrokenPipeError:
            _end(self._process)
            self._process = _start()
            for group in self._groups:
                _write(self._process, f"+{group}")


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "specpool_tools.local.guardian"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)


def _write(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def kill_group(process_group: int) -> None:
    """Send SIGKILL to every process of a group, if there is any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)


def guard(lines: IO[str]) -> None:
    """Follow `lines` until the supervisor ends, then kill what it left."""
    groups: set[int] = set()
    for line in lines:
        number = int(line[1:])
        (groups.add if line[0] == "+" else groups.discard)(number)
    for group in groups:
        kill_group(group)


def main() -> None:
    """Run the guardian, deaf to the signals that end a supervisor politely."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard(sys.stdin)


if __name__ == "__main__":
    main()
