"""The processes of one `specpool up`, started and stopped together."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specpool_tools.local.guardian import Guardian
from specpool_tools.local.processes import Processes
from specpool_tools.local.supervisor import Child

_STOP_GRACE_S = 8.0


class System:
    """The processes of one `specpool up`."""

    def __init__(self, processes: Processes, log_directory: Path, console: Console) -> None:
        self.processes = processes
        self.endpoint = processes.router.endpoint
        self._console = console
        self._guardian = Guardian()
        self.children = {spec.name: Child(spec, log_directory, self._guardian) for spec in processes.children}
        self.is_ready = False
        self.failed: asyncio.Future[Child] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Start everything at once: the parts wait for one another themselves."""
        for child in self.children.values():
            child.start(self._on_exit)

    async def stop(self) -> None:
        """Stop the router first, so that nothing new comes in, and the store last. Twice Ctrl-C does not wait."""
        for stage in self.processes.stop_stages:
            await asyncio.gather(*(self.children[name].stop(_STOP_GRACE_S) for name in stage))
        self._guardian.close()

    def kill(self) -> None:
        """Kill every process without ceremony."""
        self._guardian.close()

    def _on_exit(self, child: Child, status: int) -> bool:
        if not self.is_ready and status > 0:
            if not self.failed.done():
                self.failed.set_result(child)
            return False
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._console.print(f"{child.spec.name} ended ({how}); starting it again")
        return True

    def table(self) -> Table:
        """A table with the state of every process, for people."""
        table = Table("process", "pid", "endpoint", "starts", "last words")
        for child in self.children.values():
            words = child.last_line[-70:] if is_news(child) else ""
            table.add_row(child.spec.name, str(child.pid or "-"), child.spec.endpoint, str(child.num_starts), words)
        return table


def is_news(child: Child) -> bool:
    """Whether a line is for the user: the store's advice on the kernel is for servers with a disk; the log has it."""
    is_advice = child.spec.name == "store" and " # WARNING " in child.last_line
    return bool(child.last_line) and not is_advice
