"""What `specpool up` says of its processes while they start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specpool_tools.local.system import is_news


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("store", "97:M 27 Nov 2026 12:25:27.246 # WARNING Memory overcommit must be enabled! ...", False),
        ("store", "97:M 27 Nov 2026 12:25:27.246 # Fatal error, can't open config file", True),
        ("target-0", "12:00:00 # WARNING of a target", True),
        ("target-0", "", False),
    ],
)
def test_advice_of_the_store_stays_in_its_log(name: str, line: str, expected: bool) -> None:
    child = SimpleNamespace(spec=SimpleNamespace(name=name), last_line=line)
    assert is_news(child) is expected  # type: ignore[arg-type]
