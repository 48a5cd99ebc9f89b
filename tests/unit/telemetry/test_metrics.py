"""Exported names and values."""

from __future__ import annotations

import urllib.request

import pytest
from metric_series import series_names
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from specpool.errors import ConfigError
from specpool.telemetry.metrics import CountedHistogram, LabelCap, serve_metrics
from specpool_router.metrics import RouterMetrics
from specpool_speculator.engine.step_stats import DraftStepStats
from specpool_speculator.metrics import SpeculatorMetrics
from specpool_target.engine.statistics import StepStats
from specpool_target.metrics import TargetMetrics


def test_promised_names_are_exported() -> None:
    names = {
        "target": series_names(TargetMetrics("model").registry),
        "speculator": series_names(SpeculatorMetrics("model").registry),
        "router": series_names(RouterMetrics().registry),
    }
    assert names["target"] >= {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "specpool_speculation_lookups_total",
        "specpool_round_duration_seconds_bucket",
        "specpool_fallback_total",
        "specpool_transport_info",
    }
    assert names["speculator"] >= {"specpool_draft_rows", "specpool_tenant_tokens_total", "specpool_transport_info"}
    assert "specpool_tenant_tokens_total" in names["router"]


def test_scrape_shows_a_step() -> None:
    metrics = TargetMetrics("demo")
    metrics.observe_step(
        StepStats(num_running=2, num_hits=3, num_drafts=4, forward_s=0.01, fallbacks={"wait": 1, "novel": 2})
    )
    metrics.request_finished("stop", 1.0)
    metrics.set_transports(["grpc"])
    metrics.set_transports([])
    port = serve_metrics(metrics.registry, 0, "127.0.0.1")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    assert 'vllm:num_requests_running{model_name="demo"} 2.0' in lines
    assert 'vllm:spec_decode_num_drafts_total{model_name="demo"} 4.0' in lines
    assert 'vllm:request_success_total{finished_reason="stop",model_name="demo"} 1.0' in lines
    assert 'specpool_speculation_lookups_total{outcome="hit"} 3.0' in lines
    assert 'specpool_speculation_lookups_total{outcome="late"} 0.0' in lines
    assert 'specpool_round_duration_seconds_count{phase="forward"} 1.0' in lines
    assert 'specpool_fallback_total{reason="other"} 2.0' in lines
    assert 'specpool_transport_info{transport="grpc"} 0.0' in lines
    assert not any("_created" in line for line in lines)
    with pytest.raises(ConfigError, match="cannot serve metrics"):
        serve_metrics(metrics.registry, port, "127.0.0.1")


def test_tenant_labels_are_capped() -> None:
    cap = LabelCap(2)
    assert [cap(value) for value in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]
    router = RouterMetrics()
    for tenant in range(150):
        router.tenant_tokens(f"tenant-{tenant}", num_prompt_tokens=1)
    value = router.registry.get_sample_value
    assert value("specpool_tenant_tokens_total", {"tenant": "other", "kind": "prompt"}) == 50
    assert value("specpool_tenant_tokens_total", {"tenant": "tenant-99", "kind": "prompt"}) == 1


def test_speculator_and_router_values() -> None:
    speculator = SpeculatorMetrics("draft")
    speculator.observe_step(DraftStepStats(num_rows=12, num_stale_messages=2))
    speculator.set_estimates(0.9, {"rejection": (0.4, 1.0)})
    value = speculator.registry.get_sample_value
    assert value("specpool_draft_rows") == 12
    assert value("specpool_stale_messages_total") == 2
    assert value("specpool_miss_power_law", {"after": "rejection", "parameter": "c"}) == 0.4
    speculator.set_idle(num_sequences=0, num_targets=1, kv_cache_usage=0)
    assert value("specpool_draft_rows") == 0
    router = RouterMetrics()
    router.stream_started()
    router.stream_ended("OK", 0.5)
    assert router.registry.get_sample_value("specpool_streams_running") == 0
    assert router.registry.get_sample_value("specpool_requests_total", {"code": "OK"}) == 1


def test_counted_histogram_says_what_one_that_observes_each_says() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    bounds = (0.002, 0.5, 1, 10)
    counted = CountedHistogram("latency_seconds", "Text.", {"model_name": "m"}, bounds, registries[0])
    plain = Histogram("latency_seconds", "Text.", ["model_name"], buckets=bounds, registry=registries[1]).labels("m")
    for value, count in ((0.001, 3), (0.002, 1), (0.25, 2), (1.0, 4), (99.0, 1)):
        counted.observe(value, count)
        for _ in range(count):
            plain.observe(value)
    assert generate_latest(registries[0]) == generate_latest(registries[1])


def test_name_of_a_counted_histogram_is_taken() -> None:
    registry = CollectorRegistry()
    CountedHistogram("latency_seconds", "Text.", {}, (1,), registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("latency_seconds", "Text.", registry=registry)
