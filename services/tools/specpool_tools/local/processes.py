"""What `specpool up` starts: from its options to the command and environment of each process. No I/O but free ports."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from specpool.config import Settings, Share
from specpool.errors import ConfigError, InvalidArgument
from specpool_engine.distributions.choices import TransportChoice
from specpool_tools.local.awake import awake_command, can_keep_awake
from specpool_tools.local.colocation import (
    DRAFT_MEMORY_SHARE,
    MEMORY_SHARE,
    check_colocation,
    speculator_share,
    target_share,
)
from specpool_tools.local.supervisor import ChildSpec
from specpool_tools.models.resolve import resolve_model

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Weights in huge pages where the kernel leaves the choice to the program: a decoding step reads all of them, and
spends a few hundredths less of its time on page tables."""


class UpConfig(Settings):
    """Options of `specpool up` (section `up` of the settings file)."""

    target: str = ""
    """Target model: catalogue name, hub id, directory, or GGUF file."""
    draft: str = ""
    """Draft model; empty or `none` runs without a speculator."""
    targets: PositiveInt = 1
    """Number of target processes."""
    dtype: str = ""
    """Data type of the target and, unless `draft_dtype` is given, of the draft; empty for the services' default."""
    draft_dtype: str = ""
    """Data type of the draft."""
    device: str = ""
    """Torch device of the targets; empty for the services' default."""
    draft_device: str = ""
    """Torch device of the draft; empty: as `device`, or the one after those of the targets if they are several."""
    tensor_parallel: PositiveInt = 1
    """Devices that each target is split over: those from `device` on, the next target's behind them."""
    colocated: bool = False
    """Target and draft on one GPU, which must be given as `device`: each has its share of the memory, and the target's
    kernels go first. Start `nvidia-cuda-mps-control -d` before, or they compute in turns."""
    memory_share: Share = MEMORY_SHARE
    """`colocated`: the target's share of the GPU's memory, weights and KV cache."""
    draft_memory_share: Share = DRAFT_MEMORY_SHARE
    """`colocated`: the draft's share of the GPU's memory."""
    draft_sm_share: Share = 1.0
    """`colocated`: share of the GPU's multiprocessors that draft steps use; below 1 it needs green contexts and MPS."""
    weights: str = ""
    """Weight format of the targets: plain, prepacked or streamed."""
    draft_weights: str = ""
    """Weight format of the draft: plain, prepacked, streamed, int8 or int4."""
    attention_backend: str = ""
    """Attention of the targets: sdpa, native, flex or flash; empty for the services' default."""
    draft_attention_backend: str = ""
    """Attention of the draft; empty for the services' default."""
    compile: bool = False
    """Compile target and draft: faster steps, a start that takes minutes longer the first time."""
    draft_vocab_size: NonNegativeInt = 0
    """Tokens that are drafted, the first ones of the vocabulary; 0: all."""
    lookahead: NonNegativeInt = 0
    """Largest K; 0 for the services' default."""
    row_budget: NonNegativeInt = 0
    """Branch rows per draft step; 0 for the speculator's default."""
    fan_out: NonNegativeInt = 0
    """Guesses per round (B); 0 for the speculator's default."""
    distribution_transport: TransportChoice | Literal[""] = ""
    """How the targets want draft distributions of rejection verification: grpc, gloo, nccl or auto; empty for the
    services' default."""
    listen: str = "127.0.0.1:0"
    """Address of the router; port 0 takes any free one."""
    affinity: str = ""
    """Cores per role, such as `target=0;speculator=1` or `target-0=0,1;target-1=2,3`; empty shares all cores."""
    keep_awake: bool = False
    """Let none of these cores sleep: in a virtual machine the host may otherwise move target and draft together, where
    they share their way to memory. Whatever else runs on them goes first. Linux."""
    session_store: str = ""
    """redis://..., or memory://; empty starts an embedded Valkey."""
    tenants_file: str = ""
    """YAML file of tenants; empty: one tenant, without credentials."""
    otlp_endpoint: str = ""
    """OTLP collector for traces of all processes; empty is off."""
    log_dir: str = ""
    """Folder of the processes' logs; empty for `logs` in the cache directory."""
    ready_file: str = ""
    """File that gets the router's endpoint once everything is up."""
    ready_timeout_s: PositiveFloat = 1800.0
    """Give up when not everything is up by then."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target:
            raise ConfigError("target is required: give --target MODEL", metadata={"field": "target"})
        parse_affinity(self.affinity, self.targets)
        if self.keep_awake and not can_keep_awake():
            raise ConfigError("keep_awake needs Linux", metadata={"field": "keep_awake"})
        check_colocation(self)
        return self

    @property
    def has_speculator(self) -> bool:
        """Whether a draft was given."""
        return self.draft.strip().lower() not in ("", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All processes, in the order in which they start; they stop in the reverse order."""

    store: ChildSpec | None
    speculator: ChildSpec | None
    targets: tuple[ChildSpec, ...]
    router: ChildSpec
    awake: tuple[ChildSpec, ...] = ()
    """What keeps cores from sleeping."""

    @property
    def stop_stages(self) -> tuple[tuple[str, ...], ...]:
        """Names of what stops together: router, targets, speculator, store, the rest."""
        stages = [(self.router.name,), tuple(target.name for target in self.targets)]
        stages += [(spec.name,) for spec in (self.speculator, self.store) if spec]
        return (*stages, tuple(spec.name for spec in self.awake)) if self.awake else tuple(stages)

    @property
    def children(self) -> tuple[ChildSpec, ...]:
        """Everything, engines first: they take longest."""
        others = [spec for spec in (self.store, self.speculator) if spec]
        return (*others, *self.targets, self.router, *self.awake)


def make_plan(config: UpConfig, *, settings_file: Path | None, run_directory: Path) -> Plan:
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
    return Plan(store=store, speculator=speculator, targets=targets, router=router, awake=awake)


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
    threads = len(cores) if cores else default_threads(role, config, num_cores())
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
        **target_share(config),
    }


def _device_of_target(config: UpConfig, index: int) -> str:
    """First device of a target; of `config.targets`, the first one that no target has."""
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
        **speculator_share(config),
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


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(role: str, config: UpConfig, cores: int) -> int:
    """A quarter of the cores, at least one, for the speculator; the targets share the rest."""
    for_speculator = max(1, cores // 4) if config.has_speculator else 0
    if role == "speculator":
        return for_speculator
    return max(1, (cores - for_speculator) // config.targets)


def parse_affinity(text: str, num_targets: int) -> dict[str, tuple[int, ...]]:
    """Cores by role or process name; ranges such as 0-3 are allowed."""
    known = ["target", "speculator", *(f"target-{index}" for index in range(num_targets))]
    result: dict[str, tuple[int, ...]] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, cores = item.partition("=")
        if name not in known:
            raise InvalidArgument(f"affinity names {name!r}; known: {', '.join(known)}", metadata={"field": "affinity"})
        try:
            result[name] = tuple(core for part in cores.split(",") for core in _cores(part))
        except ValueError:
            raise InvalidArgument(
                f"affinity of {name} must be cores such as 0,1 or 0-3, got {cores!r}", metadata={"field": "affinity"}
            ) from None
    return result


def _cores(text: str) -> Iterable[int]:
    first, dash, last = text.partition("-")
    cores = range(int(first), int(last if dash else first) + 1)
    if not cores:
        raise ValueError(text)
    return cores


def split_address(address: str) -> tuple[str, int]:
    """Host as written, and port."""
    from specpool.addresses import parse_address

    _, port = parse_address(address)
    return address.rpartition(":")[0], port


def free_ports(count: int) -> Sequence[int]:
    """Ports that nobody listened on a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
