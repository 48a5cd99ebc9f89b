"""`specpool models`: list, fetch, path."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial

from specpool.errors import ModelNotFound
from specpool_tools.cli.progress import StageProgress
from specpool_tools.models.catalogue import find_entry, known_models, local_directory
from specpool_tools.models.fetch import Source, fetch_model


def run_list(output: str) -> None:
    """Print the catalogue, and which models are on this machine."""
    if output == "json":
        rows = [
            {"name": e.name, "hub_id": e.hub_id, "fetched": e.is_fetched, "path": str(e.directory)}
            for e in known_models().values()
        ]
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "hub id", "use", "here", box=None)
    for entry in known_models().values():
        table.add_row(entry.name, entry.hub_id, entry.description, "yes" if entry.is_fetched else "no")
    Console(width=max(Console().width, 120)).print(table)


def run_fetch(names: Sequence[str], source: str) -> None:
    """Fetch what is missing; print the directories, and where the models are from on standard error."""
    for entry in [find_entry(name) for name in names] or known_models().values():
        progress = StageProgress(entry.name)
        try:
            print(fetch_model(entry, Source(source), progress, say=partial(print, file=sys.stderr, flush=True)))
        finally:
            progress.close()


def run_path(name: str) -> None:
    """Print where a fetched model is."""
    entry = find_entry(name)
    directory = local_directory(name)
    if directory is None:
        raise ModelNotFound(f"{entry.name} is not on this machine: run `specpool models fetch {entry.name}`")
    print(directory)
