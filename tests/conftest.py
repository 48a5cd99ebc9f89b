"""Fixtures of all tests: real models, if they are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import grpc.aio
import pytest

from specpool.paths import models_directory

# Held for the whole process: otherwise gRPC ends its polling thread when the garbage collector finds the last server
# of an event loop that is closed already, and waits for that thread for ever.
grpc.aio.init_grpc_aio()

SMALL_MODEL = "smollm2-135m-instruct"

# Tests look in $SPECPOOL_TEST_MODELS, a folder with a directory per model. Default: where `make models` fetches to.
if (models_directory() / SMALL_MODEL / "config.json").is_file():
    os.environ.setdefault("SPECPOOL_TEST_MODELS", str(models_directory()))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder of the real test models."""
    folder = os.environ.get("SPECPOOL_TEST_MODELS")
    if not folder:
        pytest.skip("no real models here: run `make models` or set SPECPOOL_TEST_MODELS")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2_path(models_dir: Path) -> Path:
    """Directory of SmolLM2-135M-Instruct."""
    path = models_dir / SMALL_MODEL
    if not (path / "config.json").is_file():
        pytest.skip(f"{path} is not there: run `make models`")
    return path
