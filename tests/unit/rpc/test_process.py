"""Addresses and what a process sets for itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from specpool.addresses import channel_target, format_address, parse_address
from specpool.errors import ConfigError
from specpool.process import set_cpu_affinity

_PARENT = """
import subprocess, sys, time
child = "import time; from specpool.process import die_with_parent; die_with_parent(); print('ready', flush=True);" \
    "time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child])
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("text", "parts"), [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("pod.ns:9", ("pod.ns", 9))]
)
def test_addresses_round_trip(text: str, parts: tuple[str, int]) -> None:
    assert parse_address(text) == parts
    assert format_address(*parts) == text


_BAD_PORTS = ["", "host", ":80", "host:x", "host:70000", "host:-1", "host:\u0661", "host:" + "1" * 5000]
_BAD_HOSTS = ["::1:80", "[]:1", "[host]:1", "[::1:1", "a b:1", "a\n:1", "\udcff:1", "http://host:1", "user@host:1"]


@pytest.mark.parametrize("text", [*_BAD_PORTS, *_BAD_HOSTS, "h" * 5000 + ":1"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("pod.ns:9", "pod.ns:9"),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("[::1]:1, [::2]:2", "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_what_a_channel_dials(endpoint: str, target: str) -> None:
    assert channel_target(endpoint) == target


@pytest.mark.parametrize("endpoint", ["a:1,b:2", "10.0.0.1:1,[::1]:2", "10.0.0.1:1,", "10.0.0.1:1,host:2"])
def test_what_a_channel_cannot_dial(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        channel_target(endpoint)


def test_affinity_names_missing_cores() -> None:
    with pytest.raises(ConfigError, match=r"\[100000\]"):
        set_cpu_affinity([100000])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_child_dies_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while _is_running(child_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.stdout.close()
    assert not _is_running(child_pid)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
