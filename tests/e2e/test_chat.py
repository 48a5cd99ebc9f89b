"""`specpool chat` at a terminal: Ctrl-C ends an answer and not the chat, and typing is not echoed into it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        # A session of its own, whose terminal this is: only then does Ctrl-C become a signal.
        code = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        code += "from specpool_tools.cli.main import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, wanted: str, timeout_s: float = 60.0) -> str:
        """What was shown, up to and including `wanted`."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self._seen:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self._seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self._seen += os.read(self._ours, 65536).decode(errors="replace")
        before, _, self._seen = self._seen.partition(wanted)
        return before + wanted

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_ctrl_c_ends_the_answer_only(start_system: Callable[..., Any]) -> None:
    system = start_system("--target", "toy#vocab=64,step_ms=400", "--session-store", "memory://")
    endpoint = system.wait_ready()
    terminal = Terminal(["chat", "--endpoint", endpoint, "--mode", "off"], system.environment)
    try:
        terminal.read_until("> ")
        terminal.type("hello\n")
        terminal.read_until("hello\r\n")
        time.sleep(2.0)  # the answer is under way: it takes some ten seconds
        terminal.type("TYPED")
        time.sleep(1.0)
        terminal.type("\x03")
        assert "TYPED" not in terminal.read_until("interrupted")
        terminal.read_until("> ")
        assert terminal.process.poll() is None
        terminal.type("\x15/help\n")
        terminal.read_until("/save FILE")
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
