"""The command line without services: exit statuses, messages, settings, layouts, JSON shapes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from specpool.client import Completion
from specpool.config.settings import grpc_collector
from specpool.config.sources import flag_name, variable_name
from specpool.discovery.kubernetes import KubernetesDiscovery
from specpool.errors import ConfigError, SpecPoolError
from specpool.v1 import router_pb2, target_pb2, types_pb2
from specpool_tools.cli import formats, service
from specpool_tools.cli.demo import summary
from specpool_tools.cli.generate import GenerateOptions, build_request
from specpool_tools.local import endpoint


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
        (("generate", "x", "--endpoint", "h:1", "--logit-bias", "a=b"), 2, "logit_bias must be TOKEN_ID=BIAS"),
        (("generate", "x", "--endpoint", "h:1", "--logit-bias", "foo"), 2, "such as 50256=-100, got 'foo'"),
        (("generate", "x", "--endpoint", "h:1", "--system", "s"), 2, "--system needs --chat"),
        (
            ("router", "--otlp-endpoint", "http://h:4318/v1/traces"),
            2,
            "otlp_endpoint must be HOST:PORT of OTLP",
        ),
        (
            ("up", "--target", "toy", "--otlp-endpoint", "h:4318"),
            2,
            "otlp_endpoint must be HOST:PORT of OTLP",
        ),
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


@pytest.mark.parametrize(
    ("role", "flag"),
    [
        ("target", "--weights plain|prepacked|streamed|int4|gguf"),
        ("target", "--cpu-affinity INT,..."),
        ("target", "--labels TEXT,..."),
        ("target", "--metrics-port INT"),
        ("target", "--compile true|false"),
        ("up", "--distribution-transport auto|grpc|gloo|nccl"),
    ],
)
def test_help_says_what_a_flag_takes(role: str, flag: str) -> None:
    lines = specpool(role, "--help").stdout
    assert f"  {flag}" in lines
    assert not re.search(r"(?i)literal\[|tuple\[", lines)
    assert max(map(len, lines.splitlines())) <= 80


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


def test_after_the_newer_of_two_systems_has_stopped_the_older_one_is_found() -> None:
    for port in (1, 2, 3):
        endpoint.remember_endpoint(f"127.0.0.1:{port}")
    endpoint.forget_endpoint("127.0.0.1:2")
    assert endpoint.resolve_endpoint() == "127.0.0.1:3"
    endpoint.forget_endpoint("127.0.0.1:3")
    assert endpoint.resolve_endpoint() == "127.0.0.1:1"
    endpoint.forget_endpoint("127.0.0.1:1")
    with pytest.raises(SpecPoolError, match="no endpoint"):
        endpoint.resolve_endpoint()


@pytest.mark.parametrize("arguments", [("demo",), ("bench",), ("target", "--model", "toy")])
def test_a_router_alone_says_what_to_install_for_more(arguments: Sequence[str]) -> None:
    program = "import sys; sys.modules['torch'] = None; from specpool_tools.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "error: MISSING_EXTRA: " in result.stderr
    assert "pip install 'specpool[target]'" in result.stderr
    assert result.stdout == "", "nothing was fetched or started"


async def test_pods_are_not_watched_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"pip install 'specpool\[kubernetes\]'") as caught:
        await KubernetesDiscovery("default", "app=target").start()
    assert caught.value.reason == "MISSING_EXTRA"


@pytest.mark.parametrize("collector", ["", "h:4317", "http://h:4317", "https://h:443/", "[::1]:4317"])
def test_collectors_that_speak_grpc(collector: str) -> None:
    assert grpc_collector(collector) == collector


@pytest.mark.parametrize("collector", ["h:4318", "http://h:4317/v1/traces", "https://h/otlp", "h:x", "file:///tmp/x"])
def test_collectors_that_do_not(collector: str) -> None:
    with pytest.raises(ValueError, match="OTLP over gRPC"):
        grpc_collector(collector)


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
