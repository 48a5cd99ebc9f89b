"""One request leaves one trace through router, target and speculator; every promised metric is exported."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import local_services
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
    "speculator": ["specpool_draft_rows", "specpool_tenant_tokens_total{"],
    "router": ["specpool_tenant_tokens_total{"],
}


async def _generate(endpoint: str) -> Completion:
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(token_ids=[1, 2, 3, 4]),
        sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        mode=types_pb2.SPECULATION_MODE_SSD,
    )
    deadline = time.monotonic() + 15  # the router serves before it has asked the engines for their models
    async with Client(endpoint) as client:
        while True:
            completion = Completion()
            try:
                async for event in client.stream(request):
                    completion.add(event)
                return completion
            except SpecPoolError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.3)


def _attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def test_one_request_is_one_trace_over_three_services(stack) -> None:
    await asyncio.sleep(2.5)  # let the router find the engines: a request that is refused is another trace
    completion = await _generate(stack.router_endpoint)
    assert len(completion.token_ids) == 24
    await asyncio.to_thread(stack.stop)

    generations = [span for service, span in stack.receiver.spans if "gen_ai.operation.name" in _attributes(span)]
    traces = {span.trace_id for span in generations}
    assert len(traces) == 1, [(service, span.name) for service, span in stack.receiver.spans]
    trace = [(service, span) for service, span in stack.receiver.spans if span.trace_id in traces]
    assert {service for service, _ in trace} == {"specpool-router", "specpool-target", "specpool-speculator"}

    by_id = {span.span_id: service for service, span in trace}
    roots = [(service, span) for service, span in trace if not span.parent_span_id]
    assert [service for service, _ in roots] == ["specpool-router"]
    for service, span in trace:
        if span.parent_span_id:
            assert span.parent_span_id in by_id, f"the parent of {service} {span.name} is missing"
    crossings = {(by_id.get(span.parent_span_id), service) for service, span in trace if span.parent_span_id}
    assert ("specpool-router", "specpool-target") in crossings
    assert ("specpool-target", "specpool-speculator") in crossings

    router_span = next(span for service, span in trace if service == "specpool-router" and span in generations)
    assert _attributes(router_span)["gen_ai.usage.output_tokens"] == 24
    rounds = {
        service: sum(event.name == "specpool.round" for event in span.events) for service, span in trace if span.events
    }
    assert rounds.get("specpool-target", 0) > 1, rounds
    assert rounds.get("specpool-speculator", 0) > 1, rounds


async def test_every_promised_metric_is_exported_after_a_request(stack) -> None:
    completion = await _generate(stack.router_endpoint)
    pages = {role: await asyncio.to_thread(local_services.scrape, port) for role, port in stack.metrics_ports.items()}
    for role, names in PROMISED.items():
        for name in names:
            assert any(line.startswith(name) for line in pages[role].splitlines()), f"{name} of the {role}"
    (accepted,) = [line for line in pages["target"].splitlines() if line.startswith("vllm:spec_decode_num_accepted")]
    assert float(accepted.split()[-1]) == completion.stats.num_accepted_tokens > 0
