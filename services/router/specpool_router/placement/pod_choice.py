"""Which target a request gets: pure functions of what is known of the pods. Targets choose their speculators."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from specpool.errors import ModelNotFound, TargetUnavailable

_AFFINITY_SLACK = 4
"""A session's own target may be busier than the least busy one by at most this many sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What routing needs to know of a target or speculator."""

    endpoint: str
    model: str
    num_sequences: int
    """Number of sequences, running and waiting."""
    available: bool
    """Whether the pod is reachable, serving, and not draining."""
    is_leaving: bool = False
    """Whether the pod is terminating, or its node out of reach: better than none, and chosen only then."""
    is_late: bool = False
    """Whether it did not answer when it was asked last, or does not get on: another one is better."""


def choose_target(
    candidates: Sequence[Candidate], *, model: str, session_id: str = "", exclude: Collection[str] = ()
) -> Candidate:
    """The target for a request; TargetUnavailable if there is none now, also where nobody knows the model any more.

    Args:
        candidates: all targets known, those that are away included.
        model: full name, as `resolve_model` gives it.
        session_id: requests of one session prefer the same target.
        exclude: endpoints not to use.
    """
    usable = [c for c in candidates if c.model == model and c.available and c.endpoint not in exclude]
    if not usable:
        raise TargetUnavailable(
            f"no target for model {model!r} can be reached now", metadata={"model": model, "num_known": len(candidates)}
        )
    soundest = _soundest(usable)
    return _preferred(soundest, session_id) if session_id else _least_busy(soundest)


def resolve_model(candidates: Iterable[Candidate], model: str) -> str:
    """The full name of the model that a request names; empty: the only one served.

    ModelNotFound tells what is served; TargetUnavailable: nobody has said yet what it serves.
    """
    served = sorted({c.model for c in candidates if c.model})
    if not served:
        raise TargetUnavailable("no target is known to serve any model yet", metadata={"model": model})
    if model in served:
        return model
    if not model and len(served) == 1:
        return served[0]
    problem = f"model {model!r} is not served here" if model else "the request names no model and several are served"
    raise ModelNotFound(
        f"{problem}; served: {', '.join(served)}",
        metadata={"field": "model", "value": model, "accepted": ", ".join(served)},
    )


def _soundest(usable: Sequence[Candidate]) -> Sequence[Candidate]:
    """The candidates that stay and answer, if there are any; else those that stay; else all."""
    best = min((c.is_leaving, c.is_late) for c in usable)
    return [c for c in usable if (c.is_leaving, c.is_late) == best]


def _preferred(usable: Sequence[Candidate], key: str) -> Candidate:
    """The candidate with the highest hash of (key, endpoint): a pod that comes or goes moves only its own keys."""
    favourite = max(usable, key=lambda c: hashlib.sha256(f"{key}\0{c.endpoint}".encode()).digest())
    least_busy = _least_busy(usable)
    return favourite if favourite.num_sequences <= least_busy.num_sequences + _AFFINITY_SLACK else least_busy


def _least_busy(usable: Sequence[Candidate]) -> Candidate:
    return min(usable, key=lambda c: (c.num_sequences, c.endpoint))
