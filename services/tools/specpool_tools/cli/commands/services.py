"""Commands that serve until they are stopped: `up`, `target`, `speculator`, `router`. Their flags are settings."""

from __future__ import annotations

import typer

from specpool_tools.cli.commands.options import group
from specpool_tools.cli.errors import handled

app = group()

_FORWARDED = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_FORWARDED)
def up(context: typer.Context) -> None:
    """Start router, targets, speculator and session store on this machine."""
    with handled():
        from specpool_tools.cli.service import resolve_up
        from specpool_tools.local.up import run_up

        run_up(*resolve_up(context.args))


@app.command(context_settings=_FORWARDED)
def target(context: typer.Context) -> None:
    """Run a target."""
    _serve("target", context.args)


@app.command(context_settings=_FORWARDED)
def speculator(context: typer.Context) -> None:
    """Run a speculator."""
    _serve("speculator", context.args)


@app.command(context_settings=_FORWARDED)
def router(context: typer.Context) -> None:
    """Run a router."""
    _serve("router", context.args)


def _serve(role: str, arguments: list[str]) -> None:
    with handled():
        from specpool_tools.cli.service import run_service

        run_service(role, arguments)
