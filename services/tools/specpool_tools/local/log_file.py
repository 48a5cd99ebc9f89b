"""The log of one supervised process."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class LogFile:
    """Lines that cannot be written, to a full disk for example, are lost: no process ends for want of its log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_failing = False

    def write(self, text: str) -> None:
        """Append a line with the time."""
        line = f"{time.strftime('%H:%M:%S')} {text}\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode(errors="replace"))
        except OSError as error:
            if not self._is_failing:
                print(f"lines of {self._path} are lost: {error.strerror}", file=sys.stderr, flush=True)
            self._is_failing = True
        else:
            self._is_failing = False
