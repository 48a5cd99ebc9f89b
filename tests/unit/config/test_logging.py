"""One event, one line."""

from __future__ import annotations

import logging

import pytest

from specpool.errors import ConfigError
from specpool.logging import OneLineFormatter, setup_logging


def test_line_breaks_in_messages_are_escaped() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "user said %s", ("a\nERROR forged",), None)
    line = OneLineFormatter("target").format(record)
    assert "\n" not in line
    assert line.endswith("INFO target x: user said a\\nERROR forged")


def test_unknown_level() -> None:
    with pytest.raises(ConfigError, match="log_level must be one of debug, info, warning, error, got 'loud'"):
        setup_logging("loud")
