#!/usr/bin/env python3
"""Generates values.schema.json and README.md from values.yaml and its comments; `--check` only reports drift.

A comment block directly above a key describes it; a line `@schema {...}` in it adds JSON-schema constraints. Every
key needs a description or has children that do. Unknown keys are refused everywhere except in maps whose own
`@schema` says `additionalProperties`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent.parent
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z]\w*):")
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


@dataclass(kw_only=True)
class Value:
    """One key of values.yaml."""

    path: tuple[str, ...]
    default: Any
    description: str
    constraints: Mapping[str, Any]
    children: list[Value] = field(default_factory=list)

    @property
    def is_leaf(self) -> bool:
        """Whether users set it as a whole."""
        return not self.children


def parse_values(text: str) -> list[Value]:
    """The documented tree of a values file."""
    defaults = yaml.safe_load(text)
    roots: list[Value] = []
    stack: list[tuple[int, Value]] = []
    comments: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comments.append(line.lstrip().removeprefix("#").strip())
            continue
        if match := _KEY.match(line):
            indent = len(match["indent"])
            while stack and stack[-1][0] >= indent:
                stack.pop()
            parent = stack[-1][1] if stack else None
            if parent is None or "additionalProperties" not in parent.constraints:
                path = (*(parent.path if parent else ()), match["key"])
                value = _value(path, defaults, comments)
                (parent.children if parent else roots).append(value)
                stack.append((indent, value))
        comments = []
    for value in leaves(roots):
        if not value.description:
            raise SystemExit(f"values.yaml: {'.'.join(value.path)} has no description")
    return roots


def _value(path: tuple[str, ...], defaults: Any, comments: list[str]) -> Value:
    for key in path:
        defaults = defaults[key]
    constraints: dict[str, Any] = {}
    words = []
    for comment in comments:
        if comment.startswith("@schema "):
            constraints.update(yaml.safe_load(comment.removeprefix("@schema ")))
        else:
            words.append(comment)
    return Value(path=path, default=defaults, description=" ".join(words), constraints=constraints)


def leaves(values: list[Value]) -> Iterator[Value]:
    """Every key that users set as a whole, in the order of the file."""
    for value in values:
        if value.is_leaf:
            yield value
        else:
            yield from leaves(value.children)


def json_schema(roots: list[Value]) -> dict[str, Any]:
    """The whole schema; `global` is what Helm itself adds where the chart is a dependency."""
    properties = {value.path[-1]: _property(value) for value in roots}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the specpool chart",
        "type": "object",
        "additionalProperties": False,
        "properties": properties | {"global": {"type": "object"}},
    }


def _property(value: Value) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _JSON_TYPES[type(value.default)]}
    if value.description:
        schema["description"] = value.description
    if value.is_leaf:
        return schema | {"default": value.default} | value.constraints
    children = {child.path[-1]: _property(child) for child in value.children}
    return schema | {"additionalProperties": False, "properties": children}


def readme(roots: list[Value], template: str) -> str:
    """The README: the template with the table of values in place of `{{values}}`."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for value in leaves(roots):
        accepted = value.constraints.get("enum")
        meaning = value.description + (f" One of {', '.join(f'`{each}`' for each in accepted)}." if accepted else "")
        rows.append(
            f"| `{'.'.join(value.path)}` | `{json.dumps(value.default)}` | {meaning.replace('|', chr(92) + '|')} |"
        )
    return template.replace("{{values}}", "\n".join(rows))


def generated_files(chart: Path = CHART) -> dict[Path, str]:
    """What the generated files should hold."""
    roots = parse_values((chart / "values.yaml").read_text())
    return {
        chart / "values.schema.json": json.dumps(json_schema(roots), indent=2) + "\n",
        chart / "README.md": readme(roots, (chart / "README.md.tmpl").read_text()),
    }


def main() -> int:
    """Write the files, or with `--check` name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in generated_files().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(CHART)} is out of date: run python helm/specpool/ci/generate.py", file=sys.stderr)
        else:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
