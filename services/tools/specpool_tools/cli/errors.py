"""How commands end: exit status 0, 2 for bad arguments, 1 otherwise, and one clear line on standard error."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from specpool.errors import InvalidArgument, SpecPoolError

BAD_ARGUMENTS, FAILED = 2, 1


@dataclass(slots=True)
class Verbosity:
    """Holds whether errors are shown with their traceback."""

    verbose: bool = False


VERBOSITY = Verbosity()


def exit_status(error: BaseException) -> int:
    """The exit status for an error: 2 when the arguments are to blame, wherever that was noticed, else 1."""
    return BAD_ARGUMENTS if isinstance(error, InvalidArgument) else FAILED


def report(error: BaseException) -> int:
    """Print the error; return the exit status."""
    if VERBOSITY.verbose:
        traceback.print_exception(error)
    if isinstance(error, SpecPoolError):
        line = f"error: {error.reason}: {error.message}"
    else:
        line = f"error: {type(error).__name__}: {error}"
    print(" ".join(line.split("\n")), file=sys.stderr)
    return exit_status(error)


@contextmanager
def handled() -> Iterator[None]:
    """A context that turns whatever goes wrong inside into a line and an exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("error: CANCELLED: interrupted", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    except BrokenPipeError:
        raise typer.Exit(FAILED) from None
    except Exception as error:  # the last resort of a command line: no traceback for a user
        raise typer.Exit(report(error)) from error
