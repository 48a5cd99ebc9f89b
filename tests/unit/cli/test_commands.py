"""The command line without services: exit statuses, messages, settings, layouts, JSON shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from specpool.client import Completion
from specpool.config.loading import flag_name, variable_name
from specpool.errors import ConfigError, InvalidArgument, SpecPoolError
from specpool.v1 import router_pb2, target_pb2, types_pb2
from specpool_tools.cli import formats, service
from specpool_tools.cli.demo import summary
from specpool_tools.cli.generate import GenerateOptions, build_request
from specpool_tools.local import endpoint, processes
from specpool_tools.local.cores import default_threads, parse_affinity
from specpool_tools.local.processes import lay_out
from specpool_tools.local.up_config import UpConfig


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPECPOOL_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("SPECPOOL_ENDPOINT", raising=False)


def specpool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specpool_tools.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("generate", "x"), 1, "error: ENDPOINT_UNKNOWN: no endpoint: nothing was started with `specpool up`"),
        (("generate", "x", "--endpoint", "127.0.0.1:1"), 1, "error: TARGET_UNAVAILABLE: "),
        (("generate", "x", "--mode", "fast"), 2, "'fast' is not one of 'ssd', 'sd', 'off'"),
        (("generate",), 2, "Missing argument"),
        (("generate", "x", "--endpoint", "h:1", "--max-tokens", "-1"), 2, "max_tokens cannot be -1"),
        (("generate", "x", "--endpoint", "h:1", "--logit-bias", "a=b"), 2, "expected TOKEN_ID=BIAS"),
        (("up",), 2, "error: CONFIG_INVALID: target is required: give --target MODEL"),
        (
            ("up", "--target", "toy", "--draft", "toy", "--colocated", "true", "--device", "cpu"),
            2,
            "error: COLOCATION_UNAVAILABLE: colocated needs one CUDA device, and device is cpu",
        ),
        (("up", "--tagret", "x"), 2, "error: CONFIG_INVALID: unrecognized arguments: --tagret x"),
        (("up", "--target", "toy", "--targets", "0"), 2, "targets must be more than 0, got '0' (flag --targets)"),
        (("up", "--target", "toy", "--affinity", "gpu=1"), 2, "affinity names 'gpu'; known: target, speculator"),
        (("up", "--target", "qwen2.5-coder-0.5b-instruct"), 1, "run `specpool models fetch qwen2.5-coder-0.5b"),
        (("models", "path", "nope"), 1, "error: MODEL_NOT_FOUND: no model 'nope' in the catalogue; known: smollm2"),
        (
            ("router", "--session-ttl-s", "x"),
            2,
            "session_ttl_s must be a valid number, unable to parse string as a number, got 'x' (flag",
        ),
    ],
)
def test_errors_are_one_line_with_the_right_exit_status(arguments: Sequence[str], status: int, message: str) -> None:
    result = specpool(*arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if "error: " in result.stderr:
        assert result.stderr.count("\n") == 1


def test_verbose_shows_where_an_error_comes_from() -> None:
    assert "Traceback" in specpool("--verbose", "models", "path", "nope").stderr


@pytest.mark.parametrize("command", [("--help",), ("generate", "x", "--endpoint", "127.0.0.1:1"), ("models", "list")])
def test_client_commands_never_import_torch(command: Sequence[str]) -> None:
    code = (
        "import sys\nsys.argv = ['specpool', *sys.argv[1:]]\nfrom specpool_tools.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(3 if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=False)
    assert result.returncode == 0


def test_print_config_is_a_settings_file_with_the_same_meaning(tmp_path: Path) -> None:
    first = specpool("router", "--targets", "a:1,b:2", "--session-ttl-s", "7.5", "--print-config")
    assert yaml.safe_load(first.stdout)["router"]["targets"] == ["a:1", "b:2"]
    file = tmp_path / "settings.yaml"
    file.write_text(first.stdout)
    assert specpool("router", "--config", str(file), "--print-config").stdout == first.stdout


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("up: {target: from-file, draft: from-file, dtype: from-file}\nrouter: {session_ttl_s: 3}\n")
    monkeypatch.setenv("SPECPOOL_UP_DRAFT", "from-environment")
    monkeypatch.setenv("SPECPOOL_UP_DTYPE", "from-environment")
    config, settings = service.resolve_up(["--config", str(file), "--dtype", "from-flag"])
    assert (config.target, config.draft, config.dtype) == ("from-file", "from-environment", "from-flag")
    assert settings == file


@pytest.mark.parametrize("role", ["router", "speculator", "target"])
def test_every_setting_is_a_documented_flag(role: str) -> None:
    fields = service.config_class(role).model_fields
    help_text = specpool(role, "--help").stdout
    for name, field in fields.items():
        assert field.description, f"{role}: {name} has no docstring"
        assert f"  {flag_name(name)} " in help_text
        assert f"[env: {variable_name(role, name)}]" in " ".join(help_text.split())


def test_the_endpoint_comes_from_flag_then_environment_then_the_last_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecPoolError, match="no endpoint"):
        endpoint.resolve_endpoint()
    endpoint.remember_endpoint("127.0.0.1:3")
    assert endpoint.resolve_endpoint() == "127.0.0.1:3"
    monkeypatch.setenv("SPECPOOL_ENDPOINT", "127.0.0.1:2")
    assert endpoint.resolve_endpoint() == "127.0.0.1:2"
    assert endpoint.resolve_endpoint("127.0.0.1:1") == "127.0.0.1:1"
    monkeypatch.delenv("SPECPOOL_ENDPOINT")
    endpoint.forget_endpoint("127.0.0.1:9")
    assert endpoint.resolve_endpoint() == "127.0.0.1:3", "of a later `up`"
    endpoint.forget_endpoint("127.0.0.1:3")
    with pytest.raises(SpecPoolError):
        endpoint.resolve_endpoint()


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


def test_only_given_parameters_are_sent() -> None:
    request = build_request(GenerateOptions(endpoint="", numbers={"temperature": 0.0, "top_p": None, "max_tokens": 0}))
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("max_tokens"), "0 is for the server to refuse"
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("max_lookahead")
    assert request.mode == types_pb2.SPECULATION_MODE_SSD
    biased = build_request(GenerateOptions(endpoint="", logit_bias=("7=nan", "8=-1.5"), mode="off"))
    assert str(biased.sampling.logit_bias[7]) == "nan"
    assert biased.sampling.logit_bias[8] == -1.5


def completion(**stats: float) -> Completion:
    return Completion(
        text="ab",
        token_ids=[1, 2, 3],
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        usage=types_pb2.Usage(num_prompt_tokens=4, num_completion_tokens=3),
        stats=types_pb2.GenerationStats(**stats),  # type: ignore[arg-type]
    )


def test_the_json_object_of_generate() -> None:
    document = formats.completion_document(completion(num_rounds=2, num_hits=1, num_accepted_tokens=5, seconds=0.5))
    assert json.loads(json.dumps(document)) == document
    assert document["text"] == "ab"
    assert document["token_ids"] == [1, 2, 3]
    assert document["finish_reason"] == "length"
    assert document["usage"] == {"prompt_tokens": 4, "cached_prompt_tokens": 0, "completion_tokens": 3}
    stats = document["stats"]
    assert {"rounds", "hits", "partial", "misses", "accepted", "seconds"} <= stats.keys()
    assert (stats["rounds"], stats["hits"], stats["accepted"], stats["seconds"]) == (2, 1, 5, 0.5)


def test_the_json_object_of_status() -> None:
    link = target_pb2.SpeculatorLinkStatus(endpoint="h:2", connected=True, transport="grpc")
    peer = types_pb2.Peer(id="target-0", incarnation=2**64 - 1)
    entry = router_pb2.TargetEntry(
        endpoint="h:1",
        reachable=True,
        status=target_pb2.GetTargetStatusResponse(
            target=peer,
            model=types_pb2.ModelInfo(name="toy"),
            state=types_pb2.SERVING_STATE_SERVING,
            speculators=[link],
        ),
    )
    document = formats.status_document(router_pb2.GetClusterStatusResponse(targets=[entry]))
    (target,) = document["targets"]
    assert (target["id"], target["incarnation"], target["state"]) == ("target-0", "f" * 16, "serving")
    assert target["model"]["name"] == "toy"
    assert target["load"]["sequences_running"] == 0
    assert target["speculators"][0]["transport"] == "grpc"
    assert document["speculators"] == []


def test_the_summary_of_the_demo_names_speed_hit_rate_and_accepted_length() -> None:
    from rich.console import Console

    ssd = completion(num_rounds=4, num_hits=2, num_partial=1, num_misses=1, num_accepted_tokens=6, seconds=1.0)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary(ssd, completion(seconds=2.0)))
    text = console.export_text()
    for expected in ("tokens/s", "2.00", "75%", "1.50 draft tokens a round"):
        assert expected in text


def test_up_refuses_what_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="lookahead must be at least 0, got -1"):
        UpConfig(target="toy", lookahead=-1)
