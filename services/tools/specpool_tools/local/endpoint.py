"""Which router a client command talks to."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from specpool.errors import TargetUnavailable
from specpool.paths import endpoint_file, write_atomically

ENDPOINT_ENV = "SPECPOOL_ENDPOINT"


def resolve_endpoint(explicit: str = "") -> str:
    """`--endpoint`, else $SPECPOOL_ENDPOINT, else the router of this user's last `specpool up` that was not stopped."""
    if endpoint := explicit or os.environ.get(ENDPOINT_ENV, ""):
        return endpoint
    if endpoints := _endpoints():
        return endpoints[-1]
    raise TargetUnavailable(
        "no endpoint: nothing was started with `specpool up`; give --endpoint HOST:PORT or set SPECPOOL_ENDPOINT",
        reason="ENDPOINT_UNKNOWN",
    )


def remember_endpoint(endpoint: str) -> None:
    """Make `endpoint` the default of this user's client commands."""
    with _locked():
        _write([*(known for known in _endpoints() if known != endpoint), endpoint])


def forget_endpoint(endpoint: str) -> None:
    """Undo `remember_endpoint`: the default is again the latest of those that are left."""
    with suppress(OSError), _locked():
        _write([known for known in _endpoints() if known != endpoint])


def _endpoints() -> list[str]:
    """Routers that were started and not stopped, the latest last."""
    try:
        return endpoint_file().read_text(encoding="utf-8").split()
    except OSError:
        return []


def _write(endpoints: list[str]) -> None:
    path = endpoint_file()
    if endpoints:
        write_atomically(path, "\n".join(endpoints) + "\n")
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked() -> Iterator[None]:
    """A context for one process at a time: two systems may start or stop in one moment."""
    path = endpoint_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_name("endpoint.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
