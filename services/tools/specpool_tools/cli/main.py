"""`specpool`: every command."""

from __future__ import annotations

from typing import Annotated

import typer

from specpool_tools.cli.commands import measurements, models, requests, services
from specpool_tools.cli.errors import VERBOSITY

app = typer.Typer(
    name="specpool",
    help="Speculative Speculative Decoding with a shared pool of speculators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (requests, services, measurements):
    app.add_typer(commands.app)
app.add_typer(models.app, name="models")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Take the options that every command has."""
    VERBOSITY.verbose = verbose
    if version:
        from specpool import __version__

        print(f"specpool {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `specpool` program."""
    app(prog_name="specpool")


if __name__ == "__main__":
    main()
