"""What the comparison with peers computes itself: build options, times of streamed tokens, choice of settings."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from specpool_tools.models.prompts import Prompt


@pytest.fixture(scope="module")
def bench_path():
    path = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, path)
    yield path
    sys.path.remove(path)


@pytest.fixture(scope="module")
def peers(bench_path):
    import peers

    return peers


@pytest.fixture(scope="module")
def llama_cpp(bench_path):
    import llama_cpp

    return llama_cpp


def test_build_options_name_what_the_cpu_has_and_never_amx(llama_cpp):
    options = llama_cpp.build_options(["fpu", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"])
    assert {"-DGGML_AVX2=ON", "-DGGML_AVX512=ON", "-DGGML_AVX512_BF16=ON", "-DGGML_NATIVE=OFF"} <= set(options)
    assert "-DGGML_AVX512_VNNI=ON" not in options
    assert not [option for option in options if "AMX" in option]


def test_clock_leaves_the_prompt_and_the_first_step_out(peers, monkeypatch):
    import peer_systems

    times = iter([10.0, 12.0, 13.0, 15.0])
    monkeypatch.setattr(peer_systems.time, "perf_counter", lambda: next(times))
    clock = peer_systems._Clock()
    for count in (7, 2, 1, 3):  # prompt, then what three steps of assisted generation commit
        clock.put(torch.zeros(count))
    answer = clock.answer([1, 2, 3, 4, 5, 6])
    assert (answer.num_timed, answer.seconds) == (4, 3.0)


class _Fake:
    """Generates at a given pace per setting, and remembers what it was asked."""

    name, precision = "SpecPool", "16 bit"

    def __init__(self, peers, paces):
        self.ways = {"off": [{"pace": 1.0}], "ssd": [{"pace": pace} for pace in paces]}
        self.asked = []
        self._answer = peers.Answer

    @contextmanager
    def running(self):
        def generate(way, options, prompt, temperature, max_tokens):
            self.asked.append((way, options["pace"], prompt.id, temperature, max_tokens))
            return self._answer(token_ids=(1, 2, 3), num_timed=2, seconds=2 / options["pace"])

        yield generate


def test_settings_are_chosen_on_other_prompts_once_for_each_temperature(peers):
    tuning, measured = ([Prompt(source="s", id=f"{kind}{i}", text="") for i in range(2)] for kind in "tm")
    console = Console(record=True, width=150)
    system = _Fake(peers, [2.0, 5.0, 3.0])
    comparison = peers.Comparison([0.0, 1.0], 64, console)
    comparison.run(system, tuning, measured[:1])
    comparison.run(system, tuning, measured[1:])
    counted = [asked for asked in system.asked if asked[4] == 64]
    assert sorted(set(counted)) == sorted(
        (way, pace, prompt.id, t, 64)
        for way, pace in (("off", 1.0), ("ssd", 5.0))
        for prompt in measured
        for t in (0.0, 1.0)
    )
    assert len(counted) == 8
    assert len([asked for asked in system.asked if asked[4] == 32]) == 2 * 3 * 2  # prompts, settings, temperatures
    peers.show(comparison.results, console)
    row = next(line for line in console.export_text().splitlines() if "off" in line and " 0 " in line)
    assert "5.00" in row
    assert "1.00" in row
