"""Progress of long steps: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0


class StageProgress:
    """A progress callback `(stage, done, total)`; total 0 means unknown. Close it at the end."""

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._is_terminal = sys.stderr.isatty()
        self._tasks: dict[str, TaskID] = {}
        self._last_line: tuple[str, float] = ("", 0.0)
        self._bars: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done in `stage`."""
        if self._is_terminal:
            self._show_bar(stage, done, total)
        else:
            self._print_line(stage, done, total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def _show_bar(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(f"{self._label} {stage}".strip())
        self._bars.update(self._tasks[stage], completed=done, total=total or None)

    def _print_line(self, stage: str, done: int, total: int) -> None:
        last_stage, last_time = self._last_line
        finished = total > 0 and done >= total
        if stage == last_stage and not finished and time.monotonic() - last_time < _LINE_EVERY_S:
            return
        share = f" {100 * done // total}%" if total else ""
        print(f"{self._label} {stage}{share}".strip(), file=sys.stderr, flush=True)
        self._last_line = (stage, time.monotonic())
