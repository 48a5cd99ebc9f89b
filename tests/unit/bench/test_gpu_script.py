"""What `tests/bench/gpu.py` decides itself: where the draft is put, what vLLM is asked, and what a run leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from specpool_tools.cli.service import resolve_up

FAKE_VLLM = """
import json, os, time
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class Tokenizer:
    def apply_chat_template(self, chat, *, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "<user>" + chat[0]["content"]

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(character) for character in text]


class LLM:
    def __init__(self, **settings):
        if settings["model"] == "broken":
            raise ValueError("no such model")
        self.calls = [settings]

    def get_tokenizer(self):
        return Tokenizer()

    def generate(self, prompts, sampling, *, use_tqdm):
        self.calls.append([prompts, vars(sampling)])
        with open(os.environ["FAKE_VLLM_LOG"], "w") as log:
            json.dump(self.calls, log)
        time.sleep(0.05 + 0.01 * sampling.max_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * sampling.max_tokens)])]
"""


@pytest.fixture(scope="module")
def bench_path():
    path = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, path)
    yield path
    sys.path.remove(path)


@pytest.fixture(scope="module")
def gpu_systems(bench_path):
    import gpu_systems

    return gpu_systems


@pytest.fixture
def vllm_peer(bench_path, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "calls.json"))
    import vllm_peer

    return vllm_peer


def test_every_place_is_one_that_up_accepts(gpu_systems):
    pair = ["--target", "toy", "--draft", "toy"]
    colocated, _ = resolve_up([*pair, *gpu_systems.place_arguments("colocated", 0.25)])
    assert (colocated.colocated, colocated.device, colocated.draft_sm_share) == (True, "cuda", 0.25)
    for place, devices in {"separate": ("cuda:0", "cuda:1"), "cpu": ("cuda", "cpu")}.items():
        config, _ = resolve_up([*pair, *gpu_systems.place_arguments(place, 1.0)])
        assert (config.colocated, config.device, config.draft_device) == (False, *devices)


def test_a_second_gpu_is_missed_with_a_reason(gpu_systems):
    assert "needs two CUDA devices, and 1 is visible" in gpu_systems.why_not("separate", 1)
    assert [gpu_systems.why_not(place, 1) for place in ("colocated", "cpu")] == ["", ""]
    assert gpu_systems.why_not("separate", 2) == ""


def request_for(vllm_peer, **changes):
    given = {"target": "t", "draft": None, "lookahead": 4, "dtype": "bfloat16", "max_tokens": 11, "texts": ("ab", "c")}
    return vllm_peer.Request(**(given | changes))


def test_vllm_answers_the_same_prompts_greedily_and_its_prefill_is_left_out(vllm_peer, tmp_path):
    assert vllm_peer.is_installed(sys.executable)
    speed = vllm_peer.run(request_for(vllm_peer))
    settings, *calls = json.loads((tmp_path / "calls.json").read_text())
    assert (settings["model"], settings["dtype"], settings["speculative_config"]) == ("t", "bfloat16", None)
    assert settings["enable_prefix_caching"] is False
    assert [sampling["max_tokens"] for _, sampling in calls] == [11, 1, 11, 1, 11]
    assert {sampling["temperature"] for _, sampling in calls} == {0.0}
    assert calls[-1][0] == [{"prompt_token_ids": [ord(character) for character in "<user>c"]}]
    assert (speed.name, speed.num_tokens) == ("vllm, plain", 20)
    # Each token after the first takes 10 ms, and a call 50 ms more.
    assert 70 < speed.tokens_per_second < 105


def test_vllm_speculates_with_the_draft_model(vllm_peer, tmp_path):
    speed = vllm_peer.run(request_for(vllm_peer, draft="d", max_tokens=3))
    settings = json.loads((tmp_path / "calls.json").read_text())[0]
    assert settings["speculative_config"] == {"method": "draft_model", "model": "d", "num_speculative_tokens": 4}
    assert speed.name == "vllm, draft model, K=4"


def test_a_vllm_that_fails_says_why(vllm_peer):
    with pytest.raises(RuntimeError, match="no such model"):
        vllm_peer.run(request_for(vllm_peer, target="broken"))


def test_a_python_without_vllm_is_noticed(bench_path, monkeypatch):
    import vllm_peer

    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert vllm_peer.is_installed(sys.executable) == (importlib.util.find_spec("vllm") is not None)


def run_dry(bench_path, path, *arguments):
    command = [sys.executable, f"{bench_path}/gpu.py", "--dry-run-cpu", "--json", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_parts_are_runs_of_their_own_that_share_a_file(bench_path, tmp_path):
    path = tmp_path / "gpu.json"
    first = run_dry(bench_path, path, "--parts", "steps", "--backends", "flex")
    assert first.returncode == 0, first.stderr
    assert "part steps" in first.stdout
    found = json.loads(path.read_text())
    assert {step["backend"] for step in found["steps"] + found["refused"]} == {"flex"}
    assert found["copy_bytes_per_second"] > 0
    second = run_dry(bench_path, path, "--parts", "steps", "--backends", "sdpa")
    assert second.returncode == 0, second.stderr
    found = json.loads(path.read_text())
    assert {step["backend"] for step in found["steps"] + found["refused"]} == {"flex", "sdpa"}
    errors = [step["error"] for step in found["steps"] if step["backend"] == "sdpa"]
    assert errors == [0] * len(errors) != []
    other = run_dry(bench_path, path, "--parts", "bandwidth", "--lookahead", "7")
    assert other.returncode == 1
    assert "give --json another file" in other.stderr
    assert json.loads(path.read_text()) == found


def test_a_run_that_is_cut_off_leaves_what_it_had(bench_path, tmp_path):
    from gpu_results import Results

    path = tmp_path / "gpu.json"
    results = Results(path, {"device": "d"})
    results.replace("steps", "backend", "a", [{"backend": "a", "ms": 1.0}])
    results.put("systems", "cpu", {"num_answers": 1})
    results.put("systems", "cpu", {"num_answers": 2})
    assert json.loads(path.read_text()) == results.document, "written at once"
    again = Results(path, {"device": "d"})
    assert again.document["systems"] == {"cpu": {"num_answers": 2}}
    again.replace("steps", "backend", "a", [{"backend": "a", "ms": 2.0}])
    again.replace("steps", "backend", "b", [{"backend": "b", "ms": 3.0}])
    assert [step["ms"] for step in json.loads(path.read_text())["steps"]] == [2.0, 3.0]
