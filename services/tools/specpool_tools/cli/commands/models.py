"""`specpool models`: what is known, what is here, and fetching."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from specpool_tools.cli.commands.options import Output, group
from specpool_tools.cli.errors import handled

app = group(help="Known models: list, fetch, path.")


class FetchSource(StrEnum):
    """Where models are fetched from."""

    AUTO = "auto"
    HUB = "hub"
    MIRROR = "mirror"


@app.command("list")
def models_list(output: Annotated[Output, typer.Option(help="A table, or JSON.")] = Output.TEXT) -> None:
    """Known models and which of them are on this machine."""
    with handled():
        from specpool_tools.cli.models import run_list

        run_list(output)


@app.command("fetch")
def models_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names or hub ids; default all known.")] = None,
    source: Annotated[FetchSource, typer.Option(help="auto: the hub, or else the mirror.")] = FetchSource.AUTO,
) -> None:
    """Fetch models into the cache, unless they are there."""
    with handled():
        from specpool_tools.cli.models import run_fetch

        run_fetch(names or [], source)


@app.command("path")
def models_path(name: Annotated[str, typer.Argument(help="Name or hub id.")]) -> None:
    """Print the directory of a fetched model."""
    with handled():
        from specpool_tools.cli.models import run_path

        run_path(name)
