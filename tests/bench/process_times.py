"""Processor time and memory of the processes that this one started, by their role in the pool. Linux."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

ROLES: Final = ("router", "target", "speculator")
CLIENT: Final = "client"
"""This process: it sends the requests and reads the answers."""


def processor_seconds() -> Counter[str]:
    """Seconds of processor time so far: of this process, and of all its descendants by role."""
    found = Counter({CLIENT: _of_process(os.getpid())})
    for pid in _descendants(os.getpid()):
        with suppress(OSError):  # it has ended meanwhile
            if (role := _role(pid)) is not None:
                found[role] += _of_process(pid)
    return found


def resident_bytes() -> Counter[str]:
    """Resident memory of all descendants, by role."""
    found = Counter[str]()
    for pid in _descendants(os.getpid()):
        with suppress(OSError):
            if (role := _role(pid)) is not None:
                found[role] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            children.setdefault(_parent(int(entry.name)), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def _parent(pid: int) -> int:
    # The name in parentheses may hold anything; what follows the last one is regular.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _role(pid: int) -> str | None:
    """What `specpool ROLE` a process is."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    for module, role in pairwise(words):
        if module == "specpool_tools.cli.main" and role in ROLES:
            return role
    return None


def _of_process(pid: int) -> float:
    """Seconds that all threads of a process have run, to the nanosecond; those of ended threads are not counted."""
    seconds = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds
