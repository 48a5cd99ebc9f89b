"""Which router a client command talks to."""

from __future__ import annotations

import os

from specpool.errors import TargetUnavailable
from specpool.paths import endpoint_file, write_atomically

ENDPOINT_ENV = "SPECPOOL_ENDPOINT"


def resolve_endpoint(explicit: str = "") -> str:
    """`--endpoint`, else $SPECPOOL_ENDPOINT, else the router of the last `specpool up` of this user."""
    if endpoint := explicit or os.environ.get(ENDPOINT_ENV, ""):
        return endpoint
    try:
        return endpoint_file().read_text(encoding="utf-8").strip()
    except OSError:
        raise TargetUnavailable(
            "no endpoint: nothing was started with `specpool up`; give --endpoint HOST:PORT or set SPECPOOL_ENDPOINT",
            reason="ENDPOINT_UNKNOWN",
        ) from None


def remember_endpoint(endpoint: str) -> None:
    """Make `endpoint` the default of this user's client commands."""
    path = endpoint_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, endpoint + "\n")


def forget_endpoint(endpoint: str) -> None:
    """Undo `remember_endpoint`, unless a later `up` has taken the place."""
    path = endpoint_file()
    try:
        if path.read_text(encoding="utf-8").strip() == endpoint:
            path.unlink()
    except OSError:
        pass
