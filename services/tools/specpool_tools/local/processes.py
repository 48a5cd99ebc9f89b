"""What `specpool up` starts: from its options to the command and environment of each process. No I/O but free ports."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from specpool.addresses import parse_address
from specpool.errors import InvalidArgument
from specpool_tools.local.awake import awake_command
from specpool_tools.local.cores import default_threads, num_cores, parse_affinity
from specpool_tools.local.supervisor import ChildSpec
from specpool_tools.local.up_config import UpConfig
from specpool_tools.models.catalogue import resolve_model

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Tunable of glibc for weights in huge pages, where the kernel leaves the choice to the program: a decoding step reads
all of them, and spends a few hundredths less of its time on page tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """All processes, in the order in which they start; they stop in the reverse order."""

    store: ChildSpec | None
    speculator: ChildSpec | None
    targets: tuple[ChildSpec, ...]
    router: ChildSpec
    awake: tuple[ChildSpec, ...] = ()
    """Processes that keep cores from sleeping."""

    @property
    def stop_stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of the processes that stop together: router, targets, speculator, store, the rest."""
        stages = [(self.router.name,), tuple(target.name for target in self.targets)]
        stages += [(spec.name,) for spec in (self.speculator, self.store) if spec]
        return (*stages, tuple(spec.name for spec in self.awake)) if self.awake else tuple(stages)

    @property
    def children(self) -> tuple[ChildSpec, ...]:
        """All processes, engines first: they take longest."""
        others = [spec for spec in (self.store, self.speculator) if spec]
        return (*others, *self.targets, self.router, *self.awake)


def lay_out(config: UpConfig, *, settings_file: Path | None, run_directory: Path) -> Processes:
    """Decide ports, cores and threads, and write down every command."""
    ports = free_ports(config.targets + 2)
    affinity = parse_affinity(config.affinity, config.targets)
    speculator = None
    if config.has_speculator:
        speculator = _engine("speculator", "speculator", ports[-1], config, affinity, settings_file)
    targets = tuple(
        _engine("target", f"target-{index}", ports[index], config, affinity, settings_file, index)
        for index in range(config.targets)
    )
    store, store_url = _store(config, run_directory)
    host, port = split_address(config.listen)
    listen = f"{host}:{port or ports[-2]}"
    flags = {
        "id": "router",
        "listen": listen,
        "targets": ",".join(target.endpoint for target in targets),
        "speculators": speculator.endpoint if speculator else None,
        "session-store": store_url,
        "tenants-file": str(Path(config.tenants_file).resolve()) if config.tenants_file else None,
        "otlp-endpoint": config.otlp_endpoint or None,
    }
    router = ChildSpec(name="router", command=_command("router", flags, settings_file), endpoint=listen)
    awake = _awake(sorted({core for cores in affinity.values() for core in cores})) if config.keep_awake else ()
    return Processes(store=store, speculator=speculator, targets=targets, router=router, awake=awake)


def _awake(cores: Sequence[int]) -> tuple[ChildSpec, ...]:
    cores = cores or sorted(os.sched_getaffinity(0))
    return tuple(ChildSpec(name=f"awake-{core}", command=awake_command(core)) for core in cores)


def _engine(
    role: str,
    name: str,
    port: int,
    config: UpConfig,
    affinity: Mapping[str, tuple[int, ...]],
    settings_file: Path | None,
    index: int = 0,
) -> ChildSpec:
    cores = affinity.get(name) or affinity.get(role)
    threads = (
        len(cores)
        if cores
        else default_threads(role, num_cores(), num_targets=config.targets, has_speculator=config.has_speculator)
    )
    endpoint = f"127.0.0.1:{port}"
    flags = {
        "id": name,
        "listen": endpoint,
        **(_target_flags(config, index) if role == "target" else _speculator_flags(config)),
        "max-lookahead": str(config.lookahead) if config.lookahead else None,
        "otlp-endpoint": config.otlp_endpoint or None,
        "compile": "true" if config.compile else None,
        "num-threads": str(threads),
        "cpu-affinity": ",".join(map(str, cores)) if cores else None,
    }
    environment = {variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", HUGE_PAGES)
    command = _command(role, flags, settings_file)
    return ChildSpec(name=name, command=command, environment=environment, endpoint=endpoint)


def _target_flags(config: UpConfig, index: int) -> dict[str, str | None]:
    return {
        "model": resolve_model(config.target),
        "dtype": config.dtype or None,
        "device": _device_of_target(config, index) or None,
        "tensor-parallel": str(config.tensor_parallel) if config.tensor_parallel > 1 else None,
        "weights": config.weights or None,
        "attention-backend": config.attention_backend or None,
        "distribution-transport": config.distribution_transport or None,
        **_target_share(config),
    }


def _device_of_target(config: UpConfig, index: int) -> str:
    """The first device of a target; of `config.targets`, the first one that no target has."""
    kind, _, first = config.device.partition(":")
    if config.tensor_parallel == 1 or kind != "cuda":
        return config.device
    if first and not first.isdecimal():
        raise InvalidArgument(f"unknown device {config.device!r}; accepted: cpu, cuda, cuda:N")
    return f"cuda:{int(first or 0) + index * config.tensor_parallel}"


def _speculator_flags(config: UpConfig) -> dict[str, str | None]:
    return {
        "model": resolve_model(config.draft),
        "dtype": config.draft_dtype or config.dtype or None,
        "device": config.draft_device or _device_of_target(config, config.targets) or None,
        "weights": config.draft_weights or None,
        "attention-backend": config.draft_attention_backend or None,
        "draft-vocab-size": str(config.draft_vocab_size) if config.draft_vocab_size else None,
        "row-budget": str(config.row_budget) if config.row_budget else None,
        "fan-out-budget": str(config.fan_out) if config.fan_out else None,
        **_speculator_share(config),
    }


def _target_share(config: UpConfig) -> dict[str, str | None]:
    """Flags of a colocated target: its kernels go first, and it has its part of the memory."""
    if not config.colocated:
        return {}
    return {"device-memory-share": f"{config.memory_share:g}", "stream-priority": "high"}


def _speculator_share(config: UpConfig) -> dict[str, str | None]:
    """Flags of a colocated speculator: its part of the memory and of the multiprocessors."""
    if not config.colocated:
        return {}
    return {
        "device-memory-share": f"{config.draft_memory_share:g}",
        "stream-priority": "normal",
        "sm-share": f"{config.draft_sm_share:g}",
    }


def _store(config: UpConfig, run_directory: Path) -> tuple[ChildSpec | None, str]:
    if config.session_store:
        return None, config.session_store
    from specpool_tools.local.embedded_store import find_binary, server_command

    path = run_directory / "valkey.sock"
    command = server_command(find_binary(), path, directory=run_directory)
    return ChildSpec(name="store", command=command, endpoint=f"unix://{path}"), f"unix://{path}"


def _command(role: str, flags: Mapping[str, str | None], settings_file: Path | None) -> list[str]:
    command = [sys.executable, "-m", "specpool_tools.cli.main", role]
    if settings_file:
        command += ["--config", str(settings_file)]
    # --flag=value: a value may begin with a dash.
    return [*command, *(f"--{name}={value}" for name, value in flags.items() if value is not None)]


def split_address(address: str) -> tuple[str, int]:
    """The host as written, and the port."""
    _, port = parse_address(address)
    return address.rpartition(":")[0], port


def free_ports(count: int) -> Sequence[int]:
    """Numbers of ports that nobody listened on a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
