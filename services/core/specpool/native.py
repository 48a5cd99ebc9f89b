"""Code of our own in C++: compiled for the CPU at hand on first use, then kept in the cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from specpool.errors import ConfigError
from specpool.paths import cache_directory, replacing

# Without contraction a sum is rounded the same wherever it is inlined: kernels say themselves where they fuse.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def has_compiler() -> bool:
    """Whether `load_library` can compile."""
    return _compiler() is not None


@functools.cache
def load_library(source: Path, defines: tuple[tuple[str, int], ...] = ()) -> ctypes.CDLL:
    """The library compiled from a C++ file with constants of the preprocessor.

    Raises `ConfigError` COMPILER_MISSING where there is no C++ compiler, COMPILER_FAILED with its last lines.
    """
    compiler = _compiler()
    if compiler is None:
        raise ConfigError(
            f"{source.name} needs a C++ compiler and none was found: install g++", reason="COMPILER_MISSING"
        )
    # -march=native makes the code this CPU's own: another CPU on a shared cache must not find it.
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    flags = (*_FLAGS, *(f"-D{name}={value}" for name, value in defines))
    identity = "\n".join((source.read_text(), *headers, compiler, *flags, _cpu()))
    path = cache_directory() / "compiled" / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        with replacing(path) as partial:
            _compile([compiler, *flags, str(source), "-o", str(partial)])
    return ctypes.CDLL(str(path))


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-10:])
        raise ConfigError(f"`{' '.join(command)}` failed:\n{tail}", reason="COMPILER_FAILED")


def _cpu() -> str:
    """Model and flags of the first core, where the system tells."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(("model name", "flags")))
