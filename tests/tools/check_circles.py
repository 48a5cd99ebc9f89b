"""Fails where modules import one another in a circle, imports inside functions and for type checkers included."""

from __future__ import annotations

import graphlib
import sys

import grimp

PACKAGES = (
    "specpool",
    "specpool_engine",
    "specpool_target",
    "specpool_speculator",
    "specpool_router",
    "specpool_tools",
)


def find_circle() -> list[str]:
    """The modules of one circle, the first one also last; empty if there is none."""
    graph = grimp.build_graph(*PACKAGES)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


if __name__ == "__main__":
    circle = find_circle()
    if circle:
        sys.exit("modules import one another in a circle:\n  " + "\n  imports ".join(circle))
    print("no module imports itself by way of others")
