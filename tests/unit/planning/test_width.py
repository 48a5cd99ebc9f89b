"""What `specpool plan` prints fits 80 columns."""

from __future__ import annotations

import subprocess
import sys


def test_plan_fits_80_columns() -> None:
    command = [sys.executable, "-m", "specpool_tools.cli.main", "plan", "qwen-coder-1.5b-on-2-cores"]
    arguments = ["--seconds", "0.3", "--targets", "1", "--targets", "2", "--pool-for", "4"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout, "no column is cut"
    assert "busy" in result.stdout
