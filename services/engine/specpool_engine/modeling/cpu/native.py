"""The kernels of this folder, compiled on first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from specpool import native
from specpool.errors import ConfigError

_SETTINGS = {
    "streamed_linear": ("weights", "streamed", "another weights format"),
    "quantised_linear": ("weights", "int4 or gguf", "another weights format"),
    "kv_write": ("attention_backend", "native", "another attention backend"),
    "paged_attention": ("attention_backend", "native", "another attention backend"),
}
"""The setting and the value that ask for each kernel, and what would do instead."""


@functools.cache
def load_library(name: str, defines: tuple[tuple[str, int], ...] = ()) -> ctypes.CDLL:
    """The library compiled from NAME.cpp, a path from this folder, with constants of the preprocessor.

    Raises `ConfigError` COMPILER_MISSING where there is no C++ compiler, COMPILER_FAILED with its last lines.
    """
    if not native.has_compiler():
        setting, value, instead = _SETTINGS[name]
        raise ConfigError(
            f"{setting} {value!r} needs a C++ compiler and none was found: install g++, or use {instead}",
            reason="COMPILER_MISSING",
            metadata={"field": setting},
        )
    return native.load_library(Path(__file__).parent / f"{name}.cpp", defines)
