"""Where SpecPool keeps files: models, prompt sets, logs, and what a running `specpool up` says about itself."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_ENV = "SPECPOOL_CACHE"


def cache_directory() -> Path:
    """`$SPECPOOL_CACHE`, else `specpool` in the user's cache directory."""
    if explicit := os.environ.get(CACHE_ENV):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specpool"


def models_directory() -> Path:
    """Directory of fetched models, which have a directory each."""
    return cache_directory() / "models"


def prompts_directory() -> Path:
    """Directory of fetched prompt sets, which are a JSONL file each."""
    return cache_directory() / "prompts"


def logs_directory() -> Path:
    """Directory of the logs that `specpool up` writes."""
    return cache_directory() / "logs"


def runtime_directory() -> Path:
    """Private directory of this user for files that describe running processes."""
    if explicit := os.environ.get("SPECPOOL_RUNTIME_DIR"):
        return Path(explicit)
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "specpool"
    return Path(tempfile.gettempdir()) / f"specpool-{os.getuid()}"


def endpoint_file() -> Path:
    """Holds the endpoints of the routers that `specpool up` started, a line each, the latest last."""
    return runtime_directory() / "endpoint"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` for a file that takes its place once it is complete, and that goes if the block fails.

    Its name is nobody else's. A process id would not do: processes of several containers share a cache, and each is
    number 1 in its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def making_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path` that becomes `path` once it is complete, and that goes if the block fails.

    If somebody else has made `path` meanwhile, theirs stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
