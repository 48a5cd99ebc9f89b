"""One request leaves one trace through router, target and speculator; every promised metric is exported."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from typing import Any

import local_services
import pytest

from specpool.client import Client, Completion
from specpool.errors import SpecPoolError
from specpool.v1 import inference_pb2, types_pb2

# The names that dashboards and autoscalers rely on.
PROMISED = {
    "target": [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        'specpool_speculation_lookups_total{outcome="hit"}',
        'specpool_speculation_lookups_total{outcome="partial"}',
        'specpool_speculation_lookups_total{outcome="miss"}',
        'specpool_speculation_lookups_total{outcome="late"}',
        'specpool_round_duration_seconds_bucket{le="+Inf",phase="forward"}',
        "specpool_fallback_total{reason=",
        'specpool_transport_info{transport="grpc"} 1.0',
    ],
    "speculator": [
        "specpool_draft_rows",
        "specpool_prefix_cache_queries_total",
        "specpool_prefix_cache_hits_total",
        "specpool_tenant_tokens_total{",
    ],
    "router": ["specpool_tenant_tokens_total{"],
}


async def _generate(
    endpoint: str, mode: types_pb2.SpeculationMode = types_pb2.SPECULATION_MODE_SSD
) -> tuple[str, Completion]:
    """A completed request in which the speculator took part, and its id.

    The first tries may come before the router has asked the engines for their models, or, on a busy machine, before the
    target has connected to its speculator within its deadline: both are as they should be, but not what is tested here.
    """
    deadline = time.monotonic() + 30
    async with Client(endpoint) as client:
        while True:
            request = inference_pb2.GenerateRequest(
                request_id=uuid.uuid4().hex,
                tokens=inference_pb2.TokenPrompt(token_ids=[1, 2, 3, 4]),
                sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
                mode=mode,
            )
            completion = Completion()
            try:
                async for event in client.stream(request):
                    completion.add(event)
            except SpecPoolError:
                if time.monotonic() > deadline:
                    raise
            if completion.stats.num_accepted_tokens > 0:
                return request.request_id, completion
            assert time.monotonic() < deadline, completion.stats
            await asyncio.sleep(0.3)


def _attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def test_one_request_is_one_trace_over_three_services(stack) -> None:
    request_id, completion = await _generate(stack.router_endpoint)
    assert len(completion.token_ids) == 24
    await asyncio.to_thread(stack.stop)

    spans = stack.receiver.spans
    (router_span,) = [
        span
        for service, span in spans
        if service == "specpool-router" and _attributes(span).get("gen_ai.response.id") == request_id
    ]
    trace = [(service, span) for service, span in spans if span.trace_id == router_span.trace_id]
    assert {service for service, _ in trace} == {"specpool-router", "specpool-target", "specpool-speculator"}

    by_id = {span.span_id: service for service, span in trace}
    # The client may take part in tracing too: the router's span is the topmost of the services' either way.
    topmost = [service for service, span in trace if span.parent_span_id not in by_id]
    assert topmost == ["specpool-router"]
    crossings = {(by_id.get(span.parent_span_id), service) for service, span in trace if span.parent_span_id}
    assert ("specpool-router", "specpool-target") in crossings
    assert ("specpool-target", "specpool-speculator") in crossings

    assert _attributes(router_span)["gen_ai.usage.output_tokens"] == 24
    rounds = {
        service: sum(event.name == "specpool.round" for event in span.events) for service, span in trace if span.events
    }
    assert rounds.get("specpool-target", 0) > 1, rounds
    assert rounds.get("specpool-speculator", 0) > 1, rounds


@pytest.mark.parametrize("stack", [{"step_ms": 200, "network_s": 0.06}], indirect=True)
async def test_a_hit_never_waits_for_the_network(stack) -> None:
    """60 ms one way: a hit would show it if it needed one message of the speculator. Only mode sd does."""
    _, completion = await _generate(stack.router_endpoint)
    _, just_in_time = await _generate(stack.router_endpoint, types_pb2.SPECULATION_MODE_SD)
    await asyncio.to_thread(stack.stop)

    rounds = [
        {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in event.attributes}
        for service, span in stack.receiver.spans
        if service == "specpool-target"
        for event in span.events
        if event.name == "specpool.round"
    ]
    hits = [each for each in rounds if each["specpool.round.lookup"] in ("hit", "partial")]
    assert len(hits) >= completion.stats.num_hits > 0
    assert max(each["specpool.round.waiting_ms"] for each in hits) < 30.0
    beyond_forward = [each["specpool.round.duration_ms"] - each["specpool.round.forward_ms"] for each in hits]
    print(f"{len(hits)} hits; round - forward, ms: {sorted(beyond_forward)}")
    assert statistics.median(beyond_forward) < 30.0
    assert just_in_time.stats.seconds_waiting / just_in_time.stats.num_rounds > 0.1


async def test_every_promised_metric_is_exported_after_a_request(stack) -> None:
    _, completion = await _generate(stack.router_endpoint)
    pages = {role: await asyncio.to_thread(local_services.scrape, port) for role, port in stack.metrics_ports.items()}
    for role, names in PROMISED.items():
        for name in names:
            assert any(line.startswith(name) for line in pages[role].splitlines()), f"{name} of the {role}"
    (accepted,) = [line for line in pages["target"].splitlines() if line.startswith("vllm:spec_decode_num_accepted")]
    assert float(accepted.split()[-1]) >= completion.stats.num_accepted_tokens > 0
