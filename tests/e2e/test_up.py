"""`specpool up` and the client commands on toy models: contract of the command line, failures, and a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

TOY = ("--target", "toy#vocab=64,seed=3", "--draft", "toy#vocab=64,seed=3,agreement=0.9")
SystemStarter = Callable[..., Any]


def test_generate_prints_one_json_object(toy_system: Any) -> None:
    answer = toy_system.generate("hello", "--max-tokens", "24", "--ignore-eos")
    assert {"text", "token_ids", "finish_reason", "usage", "stats"} <= answer.keys()
    assert len(answer["token_ids"]) == 24
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 24
    stats = answer["stats"]
    assert {"rounds", "hits", "partial", "misses", "accepted", "seconds"} <= stats.keys()
    assert stats["hits"] + stats["partial"] + stats["misses"] == stats["rounds"]
    assert stats["hits"] > 0
    assert stats["accepted"] + stats["rounds"] + 1 >= 24


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_mode_gives_the_same_text(toy_system: Any, temperature: str) -> None:
    common = ("--max-tokens", "16", "--ignore-eos", "--seed", "5", "--temperature", temperature)
    off, sd, ssd = (toy_system.generate("same", "--mode", mode, *common) for mode in ("off", "sd", "ssd"))
    assert ssd["token_ids"] == sd["token_ids"] == off["token_ids"]
    assert off["stats"]["draft_tokens"] == 0
    assert ssd["stats"]["accepted"] > 0


def test_text_is_streamed_to_standard_output(toy_system: Any) -> None:
    expected = toy_system.generate("hello", "--max-tokens", "8", "--ignore-eos")
    result = toy_system.run("generate", "hello", "--max-tokens", "8", "--ignore-eos", "--stats")
    assert result.returncode == 0
    assert result.stdout.rstrip("\n") == expected["text"].rstrip("\n")
    assert re.search(r"8 tokens, [\d.]+ tokens/s, \d+ rounds, .* hit rate \d+%", result.stderr)


def test_the_default_endpoint_is_that_of_the_last_up(toy_system: Any) -> None:
    endpoint = toy_system.ready_file.read_text().strip()
    explicit = toy_system.run("status", "--output", "json", "--endpoint", endpoint)
    assert json.loads(explicit.stdout)["router"] == toy_system.status()["router"]


def test_status_lists_everything(toy_system: Any) -> None:
    status = toy_system.status()
    assert status["router"]["state"] == "serving"
    assert status["session_store_reachable"] is True
    assert [target["id"] for target in status["targets"]] == ["target-0", "target-1"]
    (speculator,) = status["speculators"]
    assert re.fullmatch(r"[0-9a-f]{16}", speculator["incarnation"])
    for target in status["targets"]:
        assert target["reachable"]
        assert target["model"]["vocab_size"] == 64
        assert target["load"]["free_kv_blocks"] > 0
        assert target["speculators"][0]["connected"]
        assert target["speculators"][0]["transport"] == "grpc"
    assert {peer["id"] for peer in speculator["targets"]} == {"target-0", "target-1"}
    assert "target-1" in toy_system.run("status").stdout


def test_status_says_how_much_the_prefix_caches_had(toy_system: Any) -> None:
    for _ in range(3):
        toy_system.generate("the same again, longer than several blocks of sixteen tokens", "--max-tokens", "4")
    status = toy_system.status()
    for entries in (status["targets"], status["speculators"]):
        loads = [entry["load"] for entry in entries]
        queried = sum(load["prefix_cache_queried_tokens"] for load in loads)
        assert 0 < sum(load["prefix_cache_hit_tokens"] for load in loads) < queried
    assert re.search(r"cached.*\d+%", toy_system.run("status").stdout, re.DOTALL)


def test_two_targets_generate_at_once_on_one_speculator(toy_system: Any) -> None:
    common = ("--max-tokens", "24", "--ignore-eos")
    expected = toy_system.generate("both", *common, "--mode", "off")["token_ids"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: toy_system.generate("both", *common), range(4)))
    assert [answer["token_ids"] for answer in answers] == [expected] * 4
    assert sum(answer["stats"]["hits"] for answer in answers) > 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("hi", "--max-tokens", "0"), 2, "max_tokens"),
        (("hi", "--temperature", "-1"), 2, "temperature"),
        (("hi", "--logit-bias", "3=nan"), 2, "logit_bias"),
        (("",), 2, "prompt"),
        (("a" * 5000,), 2, "CONTEXT_LENGTH_EXCEEDED"),
        (("hi", "--model", "nope"), 1, "MODEL_NOT_FOUND"),
    ],
)
def test_bad_requests_end_with_one_line(toy_system: Any, arguments: tuple[str, ...], status: int, message: str) -> None:
    result = toy_system.run("generate", *arguments)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_speculator_dies_mid_stream_and_comes_back(toy_system: Any) -> None:
    """Same text, no failed request, and hits again without a restart of the target."""
    common = ("generate", "resilient", "--max-tokens", "60", "--ignore-eos", "--temperature", "1", "--seed", "9")
    expected = toy_system.generate(*common[1:], "--mode", "off")
    before = toy_system.status()
    with subprocess.Popen(
        [sys.executable, "-m", "specpool_tools.cli.main", *common], env=toy_system.environment, stdout=subprocess.PIPE
    ) as stream:
        assert stream.stdout is not None
        received = os.read(stream.stdout.fileno(), 1 << 16)
        os.kill(toy_system.pid_of("speculator"), signal.SIGKILL)
        received += stream.stdout.read()
    assert stream.returncode == 0
    assert received.decode().rstrip("\n") == expected["text"].rstrip("\n")

    def hits_on_both_targets() -> bool:
        status = toy_system.status()
        linked = all(link["connected"] for target in status["targets"] for link in target["speculators"])
        return linked and toy_system.generate("again", "--max-tokens", "24", "--ignore-eos")["stats"]["hits"] > 0

    from_conftest(toy_system)(hits_on_both_targets, 120, "hits after the speculator's restart")
    after = toy_system.status()
    assert after["speculators"][0]["incarnation"] != before["speculators"][0]["incarnation"]
    assert after["speculators"][0]["endpoint"] == before["speculators"][0]["endpoint"]
    assert [t["incarnation"] for t in after["targets"]] == [t["incarnation"] for t in before["targets"]]


def from_conftest(system: Any) -> Callable[..., Any]:
    """`wait_until`: folders of tests are no packages."""
    wait_until: Callable[..., Any] = sys.modules[type(system).__module__].wait_until
    return wait_until


def test_ctrl_c_ends_everything_in_order(start_system: SystemStarter) -> None:
    system = start_system(*TOY)
    endpoint = system.wait_ready()
    assert system.generate("hi", "--max-tokens", "4")["token_ids"]
    assert len(system.processes()) == 6, "up, guardian, store, speculator, target, router"
    system.process.send_signal(signal.SIGINT)
    assert system.process.wait(60) == 0
    assert system.processes() == []
    result = system.run("generate", "hi")
    assert result.returncode == 1
    assert "nothing was started with `specpool up`" in result.stderr, f"{endpoint} is forgotten"


_HOLD_A_SYSTEM = """
import time
from specpool_tools.bench.system import running_system
with running_system(("--target", "toy#vocab=64", "--session-store", "memory://")) as endpoint:
    print(endpoint, flush=True)
    time.sleep(60)
"""


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
def test_sigkill_of_a_bench_ends_the_system_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD_A_SYSTEM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().rpartition(":")
        assert _accepts(host, int(port))
        process.kill()
    deadline = time.monotonic() + 15
    while _accepts(host, int(port)):
        assert time.monotonic() < deadline, "the router still serves"
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
def test_sigkill_of_up_leaves_no_process(start_system: SystemStarter) -> None:
    system = start_system(*TOY)
    system.wait_ready()
    system.process.kill()
    system.process.wait(10)
    from_conftest(system)(lambda: system.processes() == [], 10, "all processes are gone")


def test_ctrl_c_while_it_starts_leaves_no_process(start_system: SystemStarter) -> None:
    system = start_system(*TOY)
    from_conftest(system)(lambda: len(system.processes()) >= 5, 60, "processes start")
    system.process.send_signal(signal.SIGTERM)
    assert system.process.wait(60) == 0
    assert system.processes() == []
    assert not system.ready_file.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--target", "/nowhere/model"), 1, "^error: MODEL_NOT_FOUND: target-0: model '/nowhere/model' not found"),
        (("--target", "toy#vocab=64", "--dtype", "int4"), 2, "dtype"),
        (
            ("--target", "toy#vocab=64", "--draft", "toy#vocab=32", "--session-store", "memory://"),
            1,
            r"^error: TOKENIZER_MISMATCH: target toy has tokenizer a02a4f7c5d4f \(64 tokens\), "
            r"draft toy has 1178c5076e95 \(32 tokens\)",
        ),
        (
            ("--target", "toy#vocab=64", "--session-store", "redis://:secret@127.0.0.1:1/abc"),
            2,
            r"^error: CONFIG_INVALID: router: session_store is 'redis://:\*\*\*@127\.0\.0\.1:1/abc': what follows the "
            r"host must be the number of a database",
        ),
    ],
)
def test_up_says_why_it_cannot_start(
    start_system: SystemStarter, arguments: tuple[str, ...], status: int, message: str
) -> None:
    system = start_system(*arguments)
    assert system.process.wait(180) == status, system.output
    assert re.search(message, system.output, re.MULTILINE), system.output
    assert "Traceback" not in system.output
    assert system.processes() == []


def test_up_says_that_the_session_store_is_away_and_serves(start_system: SystemStarter) -> None:
    system = start_system("--target", "toy#vocab=64", "--session-store", "redis://127.0.0.1:1")
    system.wait_ready()
    assert "the session store (redis) does not answer: limits are" in system.output


def test_settings_of_every_process_come_from_one_file(start_system: SystemStarter, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "up: {target: 'toy#vocab=32', session_store: 'memory://'}\n"
        "target: {model_name: my-model, max_context: 99}\n"
        "router: {id: named-by-up}\n"
    )
    system = start_system("--config", str(file))
    system.wait_ready()
    status = system.status()
    assert status["targets"][0]["model"]["name"] == "my-model"
    assert status["targets"][0]["model"]["max_context"] == 99
    assert status["session_store"] == "memory"
    assert status["router"]["id"] == "router", "a flag of `up` wins over the file"
    assert status["speculators"] == []
    assert system.generate("hi", "--max-tokens", "4", "--model", "my-model")["stats"]["hits"] == 0
