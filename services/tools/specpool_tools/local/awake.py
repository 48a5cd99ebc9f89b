"""`python -m specpool_tools.local.awake CORE`: a core of a virtual machine that never sleeps stays where it is.

A host moves the cores of a virtual machine. Cores that sleep and wake each other, as those of two engines do, are
often found below one L3 cache, where both share its way to memory, and reading weights is most of a step; cores that
are never idle mostly lie apart. So a process of the lowest priority spins on each of them: whatever else of the
same session or container there is to run goes first. Measured: docs/adr/0012-cores-kept-awake.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def can_keep_awake() -> bool:
    """Whether the system has a priority below all others."""
    return hasattr(os, "SCHED_IDLE")


def awake_command(core: int) -> tuple[str, ...]:
    """A command that keeps `core` awake until it is killed, or its parent is gone."""
    return (sys.executable, "-m", "specpool_tools.local.awake", str(core))


@contextmanager
def cores_awake(cores: Iterable[int]) -> Iterator[None]:
    """A context in which none of these cores sleeps."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for core in cores:
            shim = (sys.executable, "-m", "specpool_tools.local.shim", str(os.getpid()))  # dies with us, however early
            processes.append(subprocess.Popen((*shim, *awake_command(core))))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def main() -> None:
    """Spin at the lowest priority until the parent is gone."""
    parent = os.getppid()
    core = int(sys.argv[1])
    try:
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        # Nothing depends on this: what does need the core says so itself.
        print(f"core {core} is not kept awake: {error}", flush=True)
        while os.getppid() == parent:
            time.sleep(1.0)
    while os.getppid() == parent:
        pass


if __name__ == "__main__":
    main()
