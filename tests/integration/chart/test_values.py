"""The chart's values: each of them does something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHART = Path(__file__).resolve().parents[3] / "helm" / "specpool"


def test_every_value_changes_what_is_rendered(template) -> None:
    """No dead options: changing any single value changes the output, or is refused with its name."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    pod_monitor = {"telemetry": {"scrape": "podMonitor"}}
    plain, monitored = template().stdout, template(pod_monitor).stdout
    notes = (CHART / "templates" / "NOTES.txt").read_text()
    for path, leaf in _leaves(schema["properties"], ()):
        values: Any = _another(leaf)
        for key in reversed(path):
            values = {key: values}
        before = plain
        if path[:2] == ("telemetry", "podMonitor"):
            values["telemetry"] |= pod_monitor["telemetry"]
            before = monitored
        finished = template(values)
        name = ".".join(path)
        assert finished.stdout != before or name in finished.stderr or f".Values.{name}" in notes, name


def _leaves(properties: dict[str, Any], path: tuple[str, ...]):  # type: ignore[no-untyped-def]
    for key, schema in properties.items():
        if "properties" in schema:
            yield from _leaves(schema["properties"], (*path, key))
        elif (*path, key) != ("global",):
            yield (*path, key), schema


def _another(leaf: dict[str, Any]) -> Any:
    """A legal value that is not the default."""
    default = leaf["default"]
    if "enum" in leaf:
        return next(each for each in leaf["enum"] if each != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default / 2
    if isinstance(default, str):
        return "30s" if "pattern" in leaf else "another"
    if isinstance(default, list):
        if leaf["items"]["type"] == "string":
            return ["another"]
        return [dict.fromkeys(leaf["items"].get("required", ["key"]), "another")]
    return {"another": "value"}
