"""Waiting until what `specpool up` started serves, and showing how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import grpc
from rich.console import Console
from rich.live import Live

from specpool.client import Client
from specpool.errors import DeadlineExceeded, Internal, SpecPoolError, TokenizerMismatch, error_from_reason
from specpool.rpc.client import channel
from specpool.v1 import router_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_tools.local.processes import Processes
from specpool_tools.local.supervisor import Child
from specpool_tools.local.system import System, is_news
from specpool_tools.local.up_config import UpConfig

_POLL_S = 0.2
_ERROR_MARK = "error: "


async def wait_ready(system: System, config: UpConfig, console: Console, stop: asyncio.Event) -> bool:
    """Wait until everything serves; False if stopped first. Raises when a process gave up or time is over."""
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
    """Show how far everything is: a live table on a terminal, a line per news elsewhere."""
    if console.is_terminal:
        with Live(system.table(), console=console, transient=True) as live:
            while True:
                await asyncio.sleep(_POLL_S)
                live.update(system.table())
    said: dict[str, str] = {}
    while True:
        for child in system.children.values():
            if is_news(child) and said.get(child.spec.name) != child.last_line:
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
    status = await _until(system, lambda status: _all_reachable(status, system.processes))
    _refuse_mismatch(status)
    if not status.session_store_reachable:
        line = f"the session store ({status.session_store}) does not answer: limits are this router's own until it does"
        print(line, file=sys.stderr, flush=True)
    if system.processes.speculator:
        # A target connects to a speculator when it is first given one: do that before users do.
        for target in system.processes.targets:
            await _link(target.endpoint, system.processes.speculator.endpoint)


async def _until(
    system: System, is_good: Callable[[router_pb2.GetClusterStatusResponse], bool]
) -> router_pb2.GetClusterStatusResponse:
    """Ask for the status until one is good, and return that."""
    async with Client(system.endpoint) as client:
        while True:
            with contextlib.suppress(SpecPoolError):
                status = await client.cluster_status()
                if is_good(status):
                    return status
            await asyncio.sleep(_POLL_S)


def _all_reachable(status: router_pb2.GetClusterStatusResponse, processes: Processes) -> bool:
    targets = [entry for entry in status.targets if entry.reachable]
    speculators = [entry for entry in status.speculators if entry.reachable]
    return (
        status.state == types_pb2.SERVING_STATE_SERVING
        and (status.session_store_reachable or processes.store is None)  # one that we have not started may be away
        and len(targets) == len(processes.targets)
        and all(entry.status.state == types_pb2.SERVING_STATE_SERVING for entry in targets)
        and len(speculators) == (1 if processes.speculator else 0)
    )


async def _link(target: str, speculator: str) -> None:
    """Tell a target of this speculator, until they are connected."""
    request = target_pb2.GetTargetStatusRequest(speculators=[types_pb2.SpeculatorEndpoint(address=speculator)])
    reported = ""
    async with channel(target) as connection:
        stub = target_pb2_grpc.TargetServiceStub(connection)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                status = await stub.GetTargetStatus(request)
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
    """Raise where target and speculator have different tokenizers: they do not become equal by trying again."""
    for target in status.targets:
        for speculator in status.speculators:
            ours, theirs = target.status.model, speculator.status.model
            if ours.tokenizer_fingerprint != theirs.tokenizer_fingerprint:
                raise TokenizerMismatch(
                    f"target {ours.name} has tokenizer {ours.tokenizer_fingerprint[:12]} ({ours.vocab_size} tokens), "
                    f"draft {theirs.name} has {theirs.tokenizer_fingerprint[:12]} ({theirs.vocab_size} tokens)",
                    metadata={"target": ours.tokenizer_fingerprint, "speculator": theirs.tokenizer_fingerprint},
                )
