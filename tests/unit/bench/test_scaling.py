"""What the scaling script computes itself: figures of a batch, what runs where, defaults of toys and real models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from specpool.v1 import types_pb2
from specpool_tools.bench.requests import Measurement, Setting

SSD = Setting(mode="ssd", temperature=0.0, lookahead=4)


@pytest.fixture(scope="module")
def scaling():
    path = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, path)
    import scaling

    yield scaling
    sys.path.remove(path)


def measurement(num_tokens: int, first_s: float, last_s: float) -> Measurement:
    stats = types_pb2.GenerationStats(
        seconds_to_first_token=first_s, seconds=last_s, num_rounds=2, seconds_forward=0.9, seconds_waiting=0.1
    )
    return Measurement(setting=SSD, prompt_id="p", source="s", token_ids=tuple(range(num_tokens)), stats=stats)


def row_of(scaling, batches, **options):
    point = scaling.Point(mode="ssd, wait", num_targets=1, batch_size=2)
    return scaling.row_of(point, batches, [(4.0, 8.0), (6.0, 16.0)], **options)


def test_total_counts_what_all_decoded_until_the_last_token(scaling):
    batch = [measurement(9, 1.0, 3.0), measurement(9, 1.5, 5.5)]  # 4 and 2 tokens/s; 16 tokens within 4.5 s
    row = row_of(scaling, [batch], stretch=1.0)
    assert row.tokens_per_second == pytest.approx(3.0)
    assert row.total_tokens_per_second == pytest.approx(16 / 4.5)
    assert (row.mode, row.rows_per_step, row.wait_share) == ("ssd, wait", 5.0, pytest.approx(0.1))


def test_of_one_sequence_both_speeds_are_the_same_however_often_it_ran(scaling):
    batches = [[measurement(9, 1.0, 3.0)], [measurement(9, 1.0, 3.0)]]
    row = row_of(scaling, batches, stretch=8.0)
    assert row.tokens_per_second == row.total_tokens_per_second == pytest.approx(32.0)
    assert row.draft_step_ms == pytest.approx(1.5)


def test_a_fallback_matters_to_ssd_alone(scaling):
    by_fallback = scaling.modes_by_fallback
    assert by_fallback(["off", "ssd"], ["auto", "wait"]) == {"auto": ["off", "ssd"], "wait": ["ssd"]}
    assert by_fallback(["off", "sd"], ["auto", "wait"]) == {"auto": ["off", "sd"]}
    assert by_fallback(["ssd"], ["backup"]) == {"backup": ["ssd"]}


def test_real_models_have_defaults_of_their_own(scaling):
    toys = scaling.parse_arguments(["batch"])
    real = scaling.parse_arguments(["batch", "--target", "a", "--draft", "b", "--up=--row-budget", "--up=16"])
    assert (toys.temperature, toys.stretch, toys.row_budget) == (1.0, 8.0, 32)
    assert (real.temperature, real.stretch, real.row_budget) == (0.0, 1.0, None)
    assert scaling.up_arguments(real)[-2:] == ("--row-budget", "16")
    assert scaling.parse_arguments(["targets"]).fallbacks == ["auto"]


@pytest.mark.parametrize(
    "words", [["--target", "a"], ["--draft", "b"], ["--target", "a", "--draft", "b", "--stretch=2"]]
)
def test_what_does_not_go_together_is_refused(scaling, words):
    with pytest.raises(SystemExit):
        scaling.parse_arguments(["batch", *words])


def test_a_run_that_is_cut_off_leaves_its_points(scaling, tmp_path, monkeypatch):
    def points(arguments):
        yield row_of(scaling, [[measurement(9, 1.0, 3.0)]], stretch=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "measure_points", points)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "batch", "--json", str(tmp_path / "batch.json")])
    with pytest.raises(KeyboardInterrupt):
        scaling.main()
    document = json.loads((tmp_path / "batch.json").read_text())
    assert [point["mode"] for point in document["points"]] == ["ssd, wait"]
    assert document["settings"]["batches"] == [1, 2, 4, 8, 16, 32]
