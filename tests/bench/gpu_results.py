"""What `gpu.py` has measured so far, in a file that is complete at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specpool.errors import InvalidArgument
from specpool.paths import write_atomically


class Results:
    """A document that is written after every change. A later run goes on with the file of an earlier one.

    Raises `InvalidArgument` where the file is of another device, other models or another shape.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        plain = json.loads(json.dumps(identity))
        self.document: dict[str, Any] = {**plain, "steps": [], "refused": [], "systems": {}, "vllm": []}
        if path and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for key, value in plain.items():
                if earlier.get(key) != value:
                    raise InvalidArgument(
                        f"{path} holds results with {key} {earlier.get(key)!r}, and this run has {value!r}: "
                        "give --json another file"
                    )
            self.document |= earlier

    def set(self, key: str, value: object) -> None:
        """A single result."""
        self.document[key] = value
        self._write()

    def put(self, key: str, name: str, value: object) -> None:
        """A result by its name, in place of an earlier one."""
        self.document[key][name] = value
        self._write()

    def replace(self, key: str, by: str, value: str, entries: Iterable[Mapping[str, Any]]) -> None:
        """Entries of a list, in place of the earlier ones whose `by` is `value`."""
        kept = [entry for entry in self.document[key] if entry[by] != value]
        self.document[key] = [*kept, *(dict(entry) for entry in entries)]
        self._write()

    def _write(self) -> None:
        if self._path:
            write_atomically(self._path, json.dumps(self.document, indent=2) + "\n")
