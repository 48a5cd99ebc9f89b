"""Where SpecPool keeps files: models, prompt sets, logs, and what a running `specpool up` says about itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_ENV = "SPECPOOL_CACHE"


def cache_directory() -> Path:
    """`$SPECPOOL_CACHE`, else `specpool` in the user's cache directory."""
    if explicit := os.environ.get(CACHE_ENV):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specpool"


def models_directory() -> Path:
    """Fetched models, a directory each."""
    return cache_directory() / "models"


def prompts_directory() -> Path:
    """Fetched prompt sets, a JSONL file each."""
    return cache_directory() / "prompts"


def logs_directory() -> Path:
    """Logs of `specpool up`."""
    return cache_directory() / "logs"


def runtime_directory() -> Path:
    """Private directory of this user for files that describe running processes."""
    if explicit := os.environ.get("SPECPOOL_RUNTIME_DIR"):
        return Path(explicit)
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "specpool"
    return Path(tempfile.gettempdir()) / f"specpool-{os.getuid()}"


def endpoint_file() -> Path:
    """Holds the endpoint of the router that the last `specpool up` started."""
    return runtime_directory() / "endpoint"
