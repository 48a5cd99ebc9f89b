"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


def group(**settings: object) -> typer.Typer:
    """Make a group of commands that belong together, formatted like all others."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, **settings)  # type: ignore[arg-type]


class Mode(StrEnum):
    """How a request speculates."""

    SSD = "ssd"
    SD = "sd"
    OFF = "off"


class Verification(StrEnum):
    """How draft tokens are accepted."""

    COUPLED = "coupled"
    REJECTION = "rejection"


class Output(StrEnum):
    """What a command prints."""

    TEXT = "text"
    JSON = "json"


Endpoint = Annotated[
    str, typer.Option(help="HOST:PORT of a router; default $SPECPOOL_ENDPOINT, then the last `specpool up`.")
]
ApiKey = Annotated[str, typer.Option(envvar="SPECPOOL_API_KEY", help="Key of the tenant.")]
