"""What a process sets for itself at start: parent death, cores, threads."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterable
from typing import Final

from specpool.errors import ConfigError

_PR_SET_PDEATHSIG: Final = 1
_THRESHOLDS: Final = (20_000, 20, 20)
"""Objects made between two collections of the youngest, and how many of these between two of the older ones."""


def die_with_parent(*, parent_pid: int | None = None, with_signal: signal.Signals = signal.SIGTERM) -> bool:
    """Have the kernel send ``with_signal`` to this process when its parent ends, however it ends.

    "Parent" is the *thread* that started this process, so start children from a thread that lives on. Linux only;
    elsewhere nothing happens and the result is False.

    Args:
        parent_pid: of the parent as the parent told it; if it ended before this call, the signal comes at once.
        with_signal: SIGKILL when nothing may survive.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), with_signal)
    return True


def set_cpu_affinity(cores: Iterable[int]) -> None:
    """Run this process, and threads started from now on, on ``cores`` only; none given: leave it."""
    wanted = set(cores)
    if not wanted:
        return
    usable = os.sched_getaffinity(0)
    if not wanted <= usable:
        raise ConfigError(
            f"cpu_affinity names cores {sorted(wanted - usable)}, this process may use {sorted(usable)}",
            metadata={"field": "cpu_affinity", "value": sorted(wanted), "accepted": sorted(usable)},
        )
    os.sched_setaffinity(0, wanted)


def freeze_loaded_objects() -> None:
    """Take what is loaded by now out of garbage collection: a full one would hold a step up for a tenth of a second.

    What is made later is looked through less often than Python would: draft trees are many small objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def set_num_threads(num_threads: int) -> None:
    """Set the threads of one operation on CPU, for libraries loaded already and later; 0: leave it.

    Torch is told only if the process has loaded it, so that processes without torch can call this too.
    """
    if num_threads <= 0:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)
