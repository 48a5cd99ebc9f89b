"""Which cores and how many threads each process of `specpool up` has."""

from __future__ import annotations

import os
from collections.abc import Iterable

from specpool.errors import InvalidArgument


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(role: str, cores: int, *, num_targets: int, has_speculator: bool) -> int:
    """Threads of a process: a quarter of `cores`, at least one, for the speculator; the targets share the rest."""
    for_speculator = max(1, cores // 4) if has_speculator else 0
    if role == "speculator":
        return for_speculator
    return max(1, (cores - for_speculator) // num_targets)


def parse_affinity(text: str, num_targets: int) -> dict[str, tuple[int, ...]]:
    """Cores by role or process name; ranges such as 0-3 are allowed."""
    known = ["target", "speculator", *(f"target-{index}" for index in range(num_targets))]
    result: dict[str, tuple[int, ...]] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, cores = item.partition("=")
        if name not in known:
            raise InvalidArgument(f"affinity names {name!r}; known: {', '.join(known)}", metadata={"field": "affinity"})
        try:
            result[name] = tuple(core for part in cores.split(",") for core in _cores(part))
        except ValueError:
            raise InvalidArgument(
                f"affinity of {name} must be cores such as 0,1 or 0-3, got {cores!r}", metadata={"field": "affinity"}
            ) from None
    return result


def _cores(text: str) -> Iterable[int]:
    first, dash, last = text.partition("-")
    cores = range(int(first), int(last if dash else first) + 1)
    if not cores:
        raise ValueError(text)
    return cores
