"""Logging set-up of every process: one event, one line, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Final, Literal

from specpool.errors import ConfigError

LEVELS: Final = ("debug", "info", "warning", "error")
Style = Literal["auto", "plain", "rich"]
# Chatty below warning, and never about SpecPool.
_QUIET: Final = ("grpc", "httpx", "httpcore", "urllib3", "asyncio", "filelock", "kubernetes", "opentelemetry")


class OneLineFormatter(logging.Formatter):
    """Escapes line breaks in messages, so that no client's text can pose as an event. Tracebacks stay readable."""

    def __init__(self, name: str = "") -> None:
        who = f" {name}" if name else ""
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)s{who} %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format the line without the traceback, line breaks escaped."""
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


def setup_logging(level: str = "info", *, name: str = "", style: Style = "auto") -> None:
    """Log to standard error from ``level`` on. Calling it again replaces the set-up.

    Args:
        level: debug, info, warning or error.
        name: of this process, in every plain line; tells services apart that share a terminal.
        style: rich (colours) or plain text; auto is rich on a terminal.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(
            f"log_level must be one of {', '.join(LEVELS)}, got {level!r}",
            metadata={"field": "log_level", "value": level, "accepted": ", ".join(LEVELS)},
        )
    handler = _rich_handler() if _wants_rich(style) else _plain_handler(name)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in _QUIET:
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))


def _wants_rich(style: Style) -> bool:
    return style == "rich" or (style == "auto" and sys.stderr.isatty())


def _plain_handler(name: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(name))
    return handler


def _rich_handler() -> logging.Handler:
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
