"""From a model's name to a local directory with its configuration, safetensors and tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specpool.errors import InvalidArgument, ModelNotFound
from specpool.paths import cache_directory, making_directory
from specpool_engine.modeling.spec import ACCEPTED_FORMS

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); total 0 means unknown."""

GGUF_NAME = "weights.gguf"
"""Name, in a model's directory, of the GGUF file that it was made of."""
_HASH_CHUNK_BYTES = 1 << 24
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def no_progress(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


def resolve_model_directory(source: str, on_progress: Progress = no_progress) -> Path:
    """Local directory of `source`, downloaded or converted first if needed; raises `ModelNotFound`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _checked_directory(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise _not_found(source, f"there is no file {path}")
        return _converted_gguf(path, on_progress)
    if path.exists():
        raise _not_found(source, f"{path} is neither a directory nor a .gguf file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise _not_found(source, f"there is no directory {path}")
    return _hub_snapshot(source, on_progress)


def find_gguf(source: str, directory: Path) -> Path:
    """The GGUF file that a model was made of; raises `InvalidArgument` where there is none."""
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        path = directory / GGUF_NAME
    if not path.is_file():
        raise InvalidArgument(
            f"weights format 'gguf' needs a model from a GGUF file: {source!r} is none, and there is no {path}",
            metadata={"field": "weights", "value": "gguf", "model": source},
        )
    return path


def _not_found(source: str, why: str) -> ModelNotFound:
    return ModelNotFound(
        f"model {source!r} not found: {why}. Accepted: {ACCEPTED_FORMS}",
        metadata={"model": source, "tried": why, "accepted": ACCEPTED_FORMS},
    )


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise _not_found(str(path), f"the directory {path} has no config.json")
    return path


def _hub_snapshot(source: str, on_progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    on_progress("download", 0, 0)
    try:
        directory = Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS, tqdm_class=_progress_bar(on_progress)))
    except Exception as error:  # the hub client raises many unrelated kinds: HTTP, validation, offline, disk
        detail = str(error).strip().split("\n", 1)[0]
        raise _not_found(
            source,
            f"no such local directory, and the Hugging Face hub gave {type(error).__name__}: {detail}",
        ) from error
    return _checked_directory(directory)


def _progress_bar(on_progress: Progress) -> type[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    class CallbackBar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        """Forwards the byte counts of the hub client's bars; draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = False
            kwargs["file"] = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the bar
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            result: bool | None = super().update(n)
            if self.unit == "B":
                on_progress("download", int(self.n), int(self.total or 0))
            return result

    return CallbackBar


def _file_checksum(path: Path, on_progress: Progress) -> str:
    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_progress("checksum", done, total)
    return digest.hexdigest()


def _converted_gguf(path: Path, on_progress: Progress) -> Path:
    """Safetensors (bfloat16) of a GGUF file, converted once per content."""
    target = cache_directory() / "converted" / _file_checksum(path, on_progress)
    if (target / "config.json").is_file():
        return target
    with making_directory(target) as partial:
        convert_gguf(path, partial, on_progress)
    return target


def convert_gguf(path: Path, destination: Path, on_progress: Progress) -> None:
    """Dequantise a GGUF file to bfloat16 safetensors in `destination`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    on_progress("convert", 0, 0)  # how far it is, the library does not tell
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer.save_pretrained(destination)
            model.save_pretrained(destination)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise _not_found(str(path), f"cannot read the GGUF file: {error}") from error
    on_progress("convert", 1, 1)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of its own: its bars would disturb ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
