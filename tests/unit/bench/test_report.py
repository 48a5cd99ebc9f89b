"""The bench's figures, against hand-computed ones."""

from __future__ import annotations

import pytest

from specpool.v1 import types_pb2
from specpool_tools.bench.report import summarize
from specpool_tools.bench.requests import Measurement, Setting

OFF = Setting(mode="off", temperature=0.0, lookahead=1)
SSD = Setting(mode="ssd", temperature=0.0, lookahead=2)


def measurement(setting: Setting, tokens: tuple[int, ...], seconds: float, **stats: object) -> Measurement:
    proto = types_pb2.GenerationStats(seconds_to_first_token=1.0, seconds=1.0 + seconds, **stats)  # type: ignore[arg-type]
    return Measurement(setting=setting, prompt_id=f"p{tokens[0]}", source="s", token_ids=tokens, stats=proto)


def test_speed_leaves_the_first_token_and_its_time_out() -> None:
    off, ssd = summarize(
        [measurement(OFF, (1, 2, 3, 4, 5), 4.0, num_rounds=4), measurement(SSD, (1, 2, 3, 4, 5), 2.0, num_rounds=2)]
    )
    assert off.tokens_per_second == pytest.approx(1.0)
    assert ssd.tokens_per_second == pytest.approx(2.0)
    assert ssd.ratios == {"off": pytest.approx(2.0)}
    assert ssd.tokens_per_round == pytest.approx(2.0)


def test_hit_rates_count_partial_hits_and_every_round() -> None:
    (ssd,) = summarize(
        [
            measurement(
                SSD,
                (1, 2, 3),
                1.0,
                num_rounds=10,
                num_hits=3,
                num_partial=4,
                num_late=1,
                lookups_by_position=[6, 4],
                hits_by_position=[3, 4],
                hits_by_rank=[5, 2],
            )
        ]
    )
    assert (ssd.hit_rate, ssd.full_hit_rate, ssd.late_rate) == pytest.approx((0.7, 0.3, 0.1))
    assert ssd.hit_rate_by_position == pytest.approx([0.5, 1.0])
    assert ssd.hit_rate_by_fan_out == pytest.approx([0.5, 0.7])


def test_prompts_that_left_plain_decoding_are_counted() -> None:
    runs = [measurement(OFF, (1, 2, 3), 1.0), measurement(OFF, (7, 8, 9), 1.0)]
    runs += [measurement(SSD, (1, 2, 3), 1.0), measurement(SSD, (7, 8, 0), 1.0)]
    assert [summary.same_as_off for summary in summarize(runs)] == [1.0, 0.5]


def test_overhead_on_hits_is_what_the_forward_leaves() -> None:
    (ssd,) = summarize(
        [measurement(SSD, (1, 2), 1.0, num_rounds=1, seconds_hit_rounds=0.2, seconds_hit_rounds_forward=0.19)]
    )
    assert ssd.hit_overhead == pytest.approx(0.05)
