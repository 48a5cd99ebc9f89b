"""`specpool up`: router, targets, speculator and session store as supervised processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console

from specpool.paths import logs_directory, write_atomically
from specpool_tools.local.endpoint import forget_endpoint, remember_endpoint
from specpool_tools.local.processes import lay_out
from specpool_tools.local.ready import wait_ready
from specpool_tools.local.system import System
from specpool_tools.local.up_config import UpConfig


def run_up(config: UpConfig, settings_file: Path | None) -> None:
    """Start the system and run it until Ctrl-C or SIGTERM."""
    asyncio.run(_run(config, settings_file))


async def _run(config: UpConfig, settings_file: Path | None) -> None:
    console = Console(stderr=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    async with running(config, settings_file, console, stop) as system:
        if system is None:
            return
        _announce(system.endpoint, config, console)
        await stop.wait()
        console.print("stopping")


@contextlib.asynccontextmanager
async def running(
    config: UpConfig, settings_file: Path | None, console: Console, stop: asyncio.Event
) -> AsyncIterator[System | None]:
    """The system, ready; None if it was stopped before. Everything is gone afterwards."""
    run_directory = Path(tempfile.mkdtemp(prefix="specpool-run-"))
    log_directory = Path(config.log_dir) if config.log_dir else _new_log_directory()
    log_directory.mkdir(parents=True, exist_ok=True)
    processes = lay_out(config, settings_file=settings_file, run_directory=run_directory)
    system = System(processes, log_directory, console)
    try:
        console.print(f"logs in {log_directory}", soft_wrap=True)
        system.start()
        ready = await wait_ready(system, config, console, stop)
        if ready:
            system.is_ready = True
            remember_endpoint(system.endpoint)
            if config.ready_file:
                write_atomically(Path(config.ready_file), system.endpoint + "\n")
        yield system if ready else None
    finally:
        forget_endpoint(system.endpoint)
        await _stop(system)
        shutil.rmtree(run_directory, ignore_errors=True)


def _new_log_directory() -> Path:
    """Make a folder named by the time and by chance: two systems that start in one second may share a cache."""
    logs_directory().mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=logs_directory()))


async def _stop(system: System) -> None:
    """Stop in order; a second signal kills what is left."""
    stopping = asyncio.create_task(system.stop())
    impatient = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, impatient.set)
    waiting = asyncio.create_task(impatient.wait())
    await asyncio.wait([stopping, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not stopping.done():
        system.kill()
        os._exit(1)
    await stopping


def _announce(endpoint: str, config: UpConfig, console: Console) -> None:
    print(f"ready at {endpoint}", flush=True)
    console.print(
        f'try: specpool generate --chat "Write a haiku about speculation" --endpoint {endpoint}\n'
        "     specpool chat    specpool status    Ctrl-C stops everything",
        highlight=False,
        soft_wrap=True,
    )
