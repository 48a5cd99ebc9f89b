"""What `specpool up` would start: commands, ports, cores, devices; nothing is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from specpool.errors import ConfigError, InvalidArgument
from specpool_tools.cli import service
from specpool_tools.local import processes, up
from specpool_tools.local.cores import default_threads, parse_affinity
from specpool_tools.local.processes import lay_out
from specpool_tools.local.up_config import UpConfig


def flag(command: Sequence[str], name: str) -> str | None:
    return next((part.partition("=")[2] for part in command if part.startswith(f"--{name}=")), None)


def test_the_layout_connects_the_processes(tmp_path: Path) -> None:
    config = UpConfig(target="toy#vocab=32", draft="toy#vocab=32", targets=2, dtype="float32", lookahead=3)
    made = lay_out(config, settings_file=tmp_path / "s.yaml", run_directory=tmp_path)
    assert made.speculator is not None
    assert made.store is not None
    assert flag(made.router.command, "targets") == ",".join(t.endpoint for t in made.targets)
    assert flag(made.router.command, "speculators") == made.speculator.endpoint
    assert flag(made.router.command, "session-store") == made.store.endpoint
    assert len({made.router.endpoint, made.speculator.endpoint, *(t.endpoint for t in made.targets)}) == 4
    assert flag(made.speculator.command, "dtype") == "float32"
    assert flag(made.targets[1].command, "max-lookahead") == "3"
    assert flag(made.targets[1].command, "id") == "target-1"
    assert str(tmp_path / "s.yaml") in made.targets[0].command
    assert made.stop_stages == (("router",), ("target-0", "target-1"), ("speculator",), ("store",))


def test_a_layout_without_draft_and_with_a_store_of_its_own(tmp_path: Path) -> None:
    config = UpConfig(target="toy", draft="none", session_store="memory://", listen="0.0.0.0:7000")
    made = lay_out(config, settings_file=None, run_directory=tmp_path)
    assert made.speculator is None
    assert made.store is None
    assert made.router.endpoint == "0.0.0.0:7000"
    assert flag(made.router.command, "speculators") is None
    assert flag(made.router.command, "session-store") == "memory://"


def test_affinity_sets_cores_and_threads(tmp_path: Path) -> None:
    config = UpConfig(target="toy", draft="toy", targets=2, affinity="target=0-1; target-1=2;speculator=3")
    made = lay_out(config, settings_file=None, run_directory=tmp_path)
    assert made.speculator is not None
    found = [(flag(c.command, "cpu-affinity"), c.environment["OMP_NUM_THREADS"]) for c in made.targets]
    assert found == [("0,1", "2"), ("2", "1")]
    assert flag(made.speculator.command, "num-threads") == "1"
    with pytest.raises(InvalidArgument, match="cores such as 0,1 or 0-3, got '3-1'"):
        parse_affinity("target=3-1", 1)


def test_target_and_draft_have_attention_backends_of_their_own(tmp_path: Path) -> None:
    config = UpConfig(target="toy", draft="toy", draft_attention_backend="native")
    made = lay_out(config, settings_file=None, run_directory=tmp_path)
    assert made.speculator is not None
    assert flag(made.targets[0].command, "attention-backend") is None
    assert flag(made.speculator.command, "attention-backend") == "native"
    both = UpConfig(target="toy", draft="none", attention_backend="flex")
    made = lay_out(both, settings_file=None, run_directory=tmp_path)
    assert flag(made.targets[0].command, "attention-backend") == "flex"


def devices(config: UpConfig, run_directory: Path) -> list[str | None]:
    """Of every target, and of the speculator."""
    made = lay_out(config, settings_file=None, run_directory=run_directory)
    assert made.speculator is not None
    return [flag(child.command, "device") for child in (*made.targets, made.speculator)]


def test_split_targets_have_devices_of_their_own(tmp_path: Path) -> None:
    pair = {"target": "toy", "draft": "toy", "targets": 2, "tensor_parallel": 2}
    assert devices(UpConfig(**pair, device="cuda"), tmp_path) == ["cuda:0", "cuda:2", "cuda:4"]
    assert devices(UpConfig(**pair, device="cuda:1", draft_device="cpu"), tmp_path) == ["cuda:1", "cuda:3", "cpu"]
    assert devices(UpConfig(**pair, device="cpu"), tmp_path) == ["cpu"] * 3
    assert devices(UpConfig(**pair), tmp_path) == [None] * 3
    whole = UpConfig(target="toy", draft="toy", targets=2, device="cuda")
    assert devices(whole, tmp_path) == ["cuda"] * 3
    target = lay_out(UpConfig(**pair), settings_file=None, run_directory=tmp_path).targets[0]
    assert flag(target.command, "tensor-parallel") == "2"
    with pytest.raises(InvalidArgument, match="unknown device 'cuda:x'"):
        devices(UpConfig(**pair, device="cuda:x"), tmp_path)


COLOCATED: dict[str, Any] = {"target": "toy", "draft": "toy", "colocated": True, "device": "cuda"}


def test_colocated_engines_have_their_shares_of_one_gpu(tmp_path: Path) -> None:
    made = lay_out(UpConfig(**COLOCATED, draft_sm_share=0.25), settings_file=None, run_directory=tmp_path)
    assert made.speculator is not None
    target, draft = made.targets[0].command, made.speculator.command
    assert [flag(command, "device") for command in (target, draft)] == ["cuda", "cuda"]
    assert [flag(command, "device-memory-share") for command in (target, draft)] == ["0.75", "0.2"]
    assert [flag(command, "stream-priority") for command in (target, draft)] == ["high", "normal"]
    assert flag(draft, "sm-share") == "0.25"
    assert service.resolve_config("target", target[4:])[0].stream_priority == "high"
    assert service.resolve_config("speculator", draft[4:])[0].sm_share == 0.25
    apart = lay_out(UpConfig(target="toy", draft="toy"), settings_file=None, run_directory=tmp_path)
    assert apart.speculator is not None
    for command in (apart.targets[0].command, apart.speculator.command):
        assert not [part for part in command if "share" in part or "priority" in part]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cpu"}, "colocated needs one CUDA device, and device is cpu"),
        ({"device": ""}, "colocated needs one CUDA device, and device is not given"),
        ({"device": "cuda:x"}, "colocated needs one CUDA device, and device is cuda:x"),
        ({"draft": "none"}, "colocated needs a draft"),
        ({"targets": 2}, "colocated is for one target, and targets is 2"),
        ({"tensor_parallel": 2}, "colocated uses one device, and each target 2"),
        ({"draft_device": "cpu"}, "colocated puts both on cuda, and draft_device is cpu"),
        ({"distribution_transport": "auto"}, "and distribution_transport is auto: set grpc or gloo"),
        ({"memory_share": 0.9}, "memory_share and draft_memory_share add up to 1.1"),
        ({"draft_sm_share": 0.0}, "draft_sm_share must be more than 0, got 0"),
        ({"colocated": False, "memory_share": 0.5}, "memory_share is 0.5, which only colocated uses"),
    ],
)
def test_what_contradicts_one_gpu_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        UpConfig(**(COLOCATED | settings))
    is_range = "must be" in words or "only colocated" in words
    assert caught.value.reason == ("CONFIG_INVALID" if is_range else "COLOCATION_UNAVAILABLE")


@pytest.mark.parametrize(("cores", "targets", "expected"), [(2, 1, (1, 1)), (16, 1, (12, 4)), (16, 3, (4, 4))])
def test_cores_are_shared_out_by_default(cores: int, targets: int, expected: tuple[int, int]) -> None:
    found = [
        default_threads(role, cores, num_targets=targets, has_speculator=True) for role in ("target", "speculator")
    ]
    assert tuple(found) == expected
    assert default_threads("target", cores, num_targets=1, has_speculator=False) == cores


def test_free_ports_are_different() -> None:
    assert len(set(processes.free_ports(20))) == 20


def test_up_refuses_what_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="lookahead must be at least 0, got -1"):
        UpConfig(target="toy", lookahead=-1)


def test_systems_that_start_in_one_second_have_logs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECPOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(up.time, "strftime", lambda text: "20260101-000000")
    first, second = up._new_log_directory(), up._new_log_directory()
    assert first != second
    assert first.parent == second.parent == tmp_path / "logs"
