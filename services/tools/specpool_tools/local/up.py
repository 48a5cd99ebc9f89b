"""`specpool up`: router, targets, speculator and session store as supervised processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.live import Live
from rich.table import Table

from specpool.client import Client
from specpool.errors import DeadlineExceeded, Internal, SpecPoolError, TokenizerMismatch, error_from_reason
from specpool.paths import logs_directory, write_atomically
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, router_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_tools.local.endpoint import forget_endpoint, remember_endpoint
from specpool_tools.local.guardian import Guardian
from specpool_tools.local.processes import Plan, UpConfig, make_plan
from specpool_tools.local.supervisor import Child

_POLL_S = 0.2
_STOP_GRACE_S = 8.0
_ERROR_MARK = "error: "


def run_up(config: UpConfig, settings_file: Path | None) -> None:
    """Run until Ctrl-C or SIGTERM."""
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


class System:
    """The processes of one `specpool up`."""

    def __init__(self, plan: Plan, log_directory: Path, console: Console) -> None:
        self.plan = plan
        self.endpoint = plan.router.endpoint
        self._console = console
        self._guardian = Guardian()
        self.children = {spec.name: Child(spec, log_directory, self._guardian) for spec in plan.children}
        self.is_ready = False
        self.failed: asyncio.Future[Child] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        """Start everything at once: the parts wait for one another themselves."""
        for child in self.children.values():
            child.start(self._on_exit)

    async def stop(self) -> None:
        """Router first, so that nothing new comes in; the store last. Twice Ctrl-C does not wait."""
        for stage in self.plan.stop_stages:
            await asyncio.gather(*(self.children[name].stop(_STOP_GRACE_S) for name in stage))
        self._guardian.close()

    def kill(self) -> None:
        """End without ceremony."""
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
        """State of every process, for people."""
        table = Table("process", "pid", "endpoint", "starts", "last words")
        for child in self.children.values():
            words = child.last_line[-70:]
            table.add_row(child.spec.name, str(child.pid or "-"), child.spec.endpoint, str(child.num_starts), words)
        return table


@contextlib.asynccontextmanager
async def running(
    config: UpConfig, settings_file: Path | None, console: Console, stop: asyncio.Event
) -> AsyncIterator[System | None]:
    """The system, ready; None if it was stopped before. Everything is gone afterwards."""
    run_directory = Path(tempfile.mkdtemp(prefix="specpool-run-"))
    log_directory = Path(config.log_dir) if config.log_dir else logs_directory() / time.strftime("%Y%m%d-%H%M%S")
    log_directory.mkdir(parents=True, exist_ok=True)
    plan = make_plan(config, settings_file=settings_file, run_directory=run_directory)
    system = System(plan, log_directory, console)
    try:
        console.print(f"logs in {log_directory}", soft_wrap=True)
        system.start()
        ready = await _wait_ready(system, config, console, stop)
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


async def _wait_ready(system: System, config: UpConfig, console: Console, stop: asyncio.Event) -> bool:
    """True once everything is up, False if stopped first; raises when a process gave up or time is over."""
    tasks = {
        "ready": asyncio.create_task(_become_ready(system, config)),
        "stop": asyncio.create_task(stop.wait()),
        "show": asyncio.create_task(_show(system, console)),
    }
    try:
        waiting: list[asyncio.Future[Any]] = [tasks["ready"], tasks["stop"], system.failed]
        await asyncio.wait(waiting, timeout=config.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        tasks["show"].cancel()
        await asyncio.wait([tasks["show"]])
    if stop.is_set():
        tasks["ready"].cancel()
        return False
    tasks["stop"].cancel()
    if system.failed.done():
        tasks["ready"].cancel()
        raise _why(system.failed.result())
    if not tasks["ready"].done():
        tasks["ready"].cancel()
        raise DeadlineExceeded(f"not everything was up after {config.ready_timeout_s:g} s")
    await tasks["ready"]
    return True


async def _show(system: System, console: Console) -> None:
    """A live table on a terminal, a line per news elsewhere."""
    if console.is_terminal:
        with Live(system.table(), console=console, transient=True) as live:
            while True:
                await asyncio.sleep(_POLL_S)
                live.update(system.table())
    said: dict[str, str] = {}
    while True:
        for child in system.children.values():
            if child.last_line and said.get(child.spec.name) != child.last_line:
                said[child.spec.name] = child.last_line
                print(f"{child.spec.name}: {child.last_line}", file=sys.stderr, flush=True)
        await asyncio.sleep(1.0)


def _why(child: Child) -> SpecPoolError:
    """The error with which a process gave up, typed as it was there."""
    for line in reversed(child.log_tail(40)):
        _, mark, rest = line.partition(_ERROR_MARK)
        reason, colon, message = rest.partition(": ")
        if mark and colon and reason.isupper():
            return error_from_reason(reason, f"{child.spec.name}: {message}")
    tail = " | ".join(child.log_tail(3))
    return Internal(f"{child.spec.name} ended with status {child.last_exit}; see {child.log_path}: {tail}")


async def _become_ready(system: System, config: UpConfig) -> None:
    plan = system.plan
    _refuse_mismatch(await _until(system, lambda status: _all_reachable(status, plan)))
    if plan.speculator:
        # A target connects to a speculator when it is first given one: do that before users do.
        for target in plan.targets:
            await _link(target.endpoint, plan.speculator.endpoint)


async def _until(
    system: System, is_good: Callable[[router_pb2.GetClusterStatusResponse], bool]
) -> router_pb2.GetClusterStatusResponse:
    """The first status that is good."""
    async with Client(system.endpoint) as client:
        while True:
            with contextlib.suppress(SpecPoolError):
                status = await client.cluster_status()
                if is_good(status):
                    return status
            await asyncio.sleep(_POLL_S)


def _all_reachable(status: router_pb2.GetClusterStatusResponse, plan: Plan) -> bool:
    targets = [entry for entry in status.targets if entry.reachable]
    speculators = [entry for entry in status.speculators if entry.reachable]
    return (
        status.state == types_pb2.SERVING_STATE_SERVING
        and len(targets) == len(plan.targets)
        and all(entry.status.state == types_pb2.SERVING_STATE_SERVING for entry in targets)
        and len(speculators) == (1 if plan.speculator else 0)
    )


async def _link(target: str, speculator: str) -> None:
    """Run a short sequence on a target with this speculator, until they are connected."""
    request = target_pb2.RunSequenceRequest(
        request=inference_pb2.GenerateRequest(
            tokens=inference_pb2.TokenPrompt(token_ids=[1, 2]),
            sampling=types_pb2.SamplingParams(max_tokens=8, ignore_eos=True),
            mode=types_pb2.SPECULATION_MODE_SSD,
        ),
        tenant="warm-up",
        speculator_endpoint=speculator,
    )
    reported = ""
    async with channel(target) as connection:
        stub = target_pb2_grpc.TargetServiceStub(connection)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in stub.RunSequence(request):
                    pass
                status = await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
                links = [link for link in status.speculators if link.endpoint == speculator]
                if any(link.connected for link in links):
                    return
                for link in links:
                    reported = _say_once(reported, f"target {target}: {link.last_error}" if link.last_error else "")
            await asyncio.sleep(_POLL_S)


def _say_once(reported: str, line: str) -> str:
    if line and line != reported:
        print(line, file=sys.stderr, flush=True)
    return line


def _refuse_mismatch(status: router_pb2.GetClusterStatusResponse) -> None:
    """Different tokenizers do not become equal by trying again."""
    for target in status.targets:
        for speculator in status.speculators:
            ours, theirs = target.status.model, speculator.status.model
            if ours.tokenizer_fingerprint != theirs.tokenizer_fingerprint:
                raise TokenizerMismatch(
                    f"target {ours.name} has tokenizer {ours.tokenizer_fingerprint[:12]} ({ours.vocab_size} tokens), "
                    f"draft {theirs.name} has {theirs.tokenizer_fingerprint[:12]} ({theirs.vocab_size} tokens)",
                    metadata={"target": ours.tokenizer_fingerprint, "speculator": theirs.tokenizer_fingerprint},
                )


def _announce(endpoint: str, config: UpConfig, console: Console) -> None:
    print(f"ready at {endpoint}", flush=True)
    console.print(
        f'try: specpool generate --chat "Write a haiku about speculation" --endpoint {endpoint}\n'
        "     specpool chat    specpool status    Ctrl-C stops everything",
        highlight=False,
        soft_wrap=True,
    )
