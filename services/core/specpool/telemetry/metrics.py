"""Prometheus metrics of the three services, one registry each.

Targets keep vLLM's names, so that dashboards and autoscalers made for it work; the rest has the prefix ``specpool_``.
Children of labelled metrics are looked up once, so that a step costs a few additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics import MetricWrapperBase

from specpool.errors import ConfigError
from specpool.telemetry.step_stats import DraftStepStats, StepStats

LOOKUP_OUTCOMES: Final = ("hit", "partial", "late", "miss")
ROUND_PHASES: Final = ("waiting", "forward", "verify", "other")
FALLBACK_REASONS: Final = ("wait", "backup", "no_draft", "deadline", "speculator_lost", "late_distributions")
"""Why a round was not what it should have been: a miss waited for a speculation, used the backup, or had no draft; a
deadline passed; the speculator was lost; draft distributions came too late (sample-and-match)."""
_Metric = TypeVar("_Metric", bound=MetricWrapperBase)

MAX_TENANT_LABELS: Final = 100
OTHER: Final = "other"

_STEP_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.35, 0.5, 1, 2, 5)
_TOKEN_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_FIRST_TOKEN_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_BUCKETS_S: Final = (0.1, 0.3, 0.5, 1, 1.5, 2, 3, 5, 8, 12, 20, 30, 45, 60, 120, 240, 480, 960)

# Each counter and histogram would otherwise export a second series with its creation time.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class LabelCap:
    """Keeps a label that clients influence from growing without bound: the first values seen, then "other"."""

    def __init__(self, limit: int = MAX_TENANT_LABELS) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        """``value`` itself, or "other" when ``limit`` different ones were seen before it."""
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value


class TenantTokens:
    """Tokens by tenant and kind (prompt, completion, draft)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counter = Counter(
            "specpool_tenant_tokens", "Tokens by tenant and kind.", ["tenant", "kind"], registry=registry
        )
        self._cap = LabelCap()

    def add(self, tenant: str, kind: str, num_tokens: int) -> None:
        """Count tokens of ``kind`` for ``tenant``."""
        self._counter.labels(self._cap(tenant), kind).inc(num_tokens)


class TargetMetrics:
    """Metrics of one target process."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        make = _Factory(self.registry, model_name)
        self._running = make.gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = make.gauge("vllm:num_requests_waiting", "Sequences waiting for admission.")
        self._kv_usage = make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all of them.")
        self._preemptions = make.counter("vllm:num_preemptions", "Sequences preempted for lack of KV blocks.")
        self._prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens prefilled.")
        self._generation_tokens = make.counter("vllm:generation_tokens", "Tokens committed.")
        self._drafts = make.counter("vllm:spec_decode_num_drafts", "Verifications with draft tokens.")
        self._draft_tokens = make.counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._accepted = make.counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._first_token = make.histogram(
            "vllm:time_to_first_token_seconds", "Admission to first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self._inter_token = make.histogram(
            "vllm:inter_token_latency_seconds", "Between tokens of one request.", _TOKEN_BUCKETS_S
        )
        self._e2e = make.histogram("vllm:e2e_request_latency_seconds", "Whole requests.", _REQUEST_BUCKETS_S)
        self._finished = Counter(
            "vllm:request_success",
            "Requests finished.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model_name = model_name
        self._init_speculation()

    def _init_speculation(self) -> None:
        self._lookups = _children(
            Counter(
                "specpool_speculation_lookups",
                "Lookups in the speculation cache by outcome.",
                ["outcome"],
                registry=self.registry,
            ),
            LOOKUP_OUTCOMES,
        )
        self._phases = _children(
            Histogram(
                "specpool_round_duration_seconds",
                "Time of a round by phase.",
                ["phase"],
                buckets=_STEP_BUCKETS_S,
                registry=self.registry,
            ),
            ROUND_PHASES,
        )
        self._fallbacks = _children(
            Counter("specpool_fallback", "Rounds that fell back, by reason.", ["reason"], registry=self.registry),
            (*FALLBACK_REASONS, OTHER),
        )
        self._stale = Counter(
            "specpool_stale_messages",
            "Messages dropped because their incarnation, sequence or round has passed.",
            registry=self.registry,
        )
        self._fallback_batch_size = Gauge(
            "specpool_fallback_batch_size",
            "Batch size b* from which a miss uses the backup; 0: not measured yet.",
            registry=self.registry,
        )
        self._links = Gauge(
            "specpool_speculator_links", "Speculators connected to this target.", registry=self.registry
        )
        self._transport = _TransportInfo(self.registry)
        self._dense_bytes = _dense_bytes(self.registry)
        self._engine = _EngineInfo(self.registry)

    def observe_step(self, step: StepStats) -> None:
        """Take in one step."""
        self._running.set(step.num_running)
        self._waiting.set(step.num_waiting)
        self._kv_usage.set(step.kv_cache_usage)
        for phase, seconds in zip(
            ROUND_PHASES, (step.waiting_s, step.forward_s, step.verify_s, step.other_s), strict=True
        ):
            self._phases[phase].observe(seconds)
        _add(self._drafts, step.num_drafts)
        _add(self._draft_tokens, step.num_draft_tokens)
        _add(self._accepted, step.num_accepted_tokens)
        _add(self._prompt_tokens, step.num_prompt_tokens)
        _add(self._generation_tokens, step.num_generation_tokens)
        _add(self._preemptions, step.num_preemptions)
        for outcome, count in zip(
            LOOKUP_OUTCOMES, (step.num_hits, step.num_partial, step.num_late, step.num_misses), strict=True
        ):
            _add(self._lookups[outcome], count)
        for reason, count in step.fallbacks.items():
            _add(self._fallbacks.get(reason, self._fallbacks[OTHER]), count)

    def set_queue(self, *, num_running: int, num_waiting: int, kv_cache_usage: float) -> None:
        """Between steps: when the batch empties, no step reports it."""
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._kv_usage.set(kv_cache_usage)

    def first_token(self, seconds: float) -> None:
        """A request got its first token, ``seconds`` after its arrival."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int = 1) -> None:
        """A request got ``num_tokens`` at once, ``seconds`` after the ones before."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def request_finished(self, reason: str, seconds: float) -> None:
        """A request ended: stop, length, cancelled or error."""
        self._finished.labels(self._model_name, reason).inc()
        self._e2e.observe(seconds)

    def stale_message(self, count: int = 1) -> None:
        """Messages from a speculator were dropped as stale."""
        self._stale.inc(count)

    def set_fallback_batch_size(self, size: int) -> None:
        """b* was computed anew."""
        self._fallback_batch_size.set(size)

    def set_links(self, num_connected: int) -> None:
        """Speculators connected now."""
        self._links.set(num_connected)

    def set_transports(self, transports: Iterable[str]) -> None:
        """Transports of draft distributions in use now."""
        self._transport.set(transports)

    def dense_distributions(self, num_bytes: int) -> None:
        """Dense draft distributions were sent or received. May be called from any thread."""
        self._dense_bytes.inc(num_bytes)

    def set_engine(self, *, attention_backend: str, dtype: str, device: str) -> None:
        """What the engine runs with."""
        self._engine.set(self._model_name, attention_backend, dtype, device)


class SpeculatorMetrics:
    """Metrics of one speculator process."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._model_name = model_name
        registry = self.registry
        self._rows = Gauge("specpool_draft_rows", "Rows of the last draft step.", registry=registry)
        self._step = Histogram(
            "specpool_draft_step_duration_seconds",
            "Draft steps, everything included.",
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._forward = Histogram(
            "specpool_draft_forward_duration_seconds",
            "Forwards of the draft model.",
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self._draft_tokens = Counter("specpool_draft_tokens", "Tokens drafted.", registry=registry)
        self._entries = Counter("specpool_table_entries", "Table entries pushed.", registry=registry)
        self._dropped = Counter("specpool_dropped_branches", "Branches ruled out before use.", registry=registry)
        self._stale = Counter(
            "specpool_stale_messages",
            "Messages dropped because their incarnation, sequence or round has passed.",
            registry=registry,
        )
        self._resyncs = Counter("specpool_resyncs", "Sequences asked for again.", registry=registry)
        self._sequences = Gauge("specpool_sequences", "Sequences held.", registry=registry)
        self._targets = Gauge("specpool_targets", "Targets connected.", registry=registry)
        self._kv_usage = Gauge("specpool_kv_cache_usage_ratio", "Share of KV blocks in use.", registry=registry)
        self._acceptance = Gauge("specpool_acceptance_rate", "Estimated acceptance per token.", registry=registry)
        self._power_law = Gauge(
            "specpool_miss_power_law",
            "Fitted miss power law c / F^r after a rejection and after K acceptances.",
            ["after", "parameter"],
            registry=registry,
        )
        self._tenants = TenantTokens(registry)
        self._transport = _TransportInfo(registry)
        self._dense_bytes = _dense_bytes(registry)
        self._engine = _EngineInfo(registry)

    def observe_step(self, step: DraftStepStats) -> None:
        """Take in one step."""
        self._rows.set(step.num_rows)
        self._step.observe(step.step_s)
        self._forward.observe(step.forward_s)
        self._sequences.set(step.num_sequences)
        self._targets.set(step.num_targets)
        self._kv_usage.set(step.kv_cache_usage)
        _add(self._draft_tokens, step.num_draft_tokens)
        _add(self._entries, step.num_table_entries)
        _add(self._dropped, step.num_dropped_branches)
        _add(self._stale, step.num_stale_messages)

    def set_idle(self, *, num_sequences: int, num_targets: int, kv_cache_usage: float) -> None:
        """Between steps: when there is nothing to draft, no step reports it."""
        self._rows.set(0)
        self._sequences.set(num_sequences)
        self._targets.set(num_targets)
        self._kv_usage.set(kv_cache_usage)

    def tenant_tokens(self, tenant: str, num_draft_tokens: int) -> None:
        """Tokens were drafted for ``tenant``."""
        self._tenants.add(tenant, "draft", num_draft_tokens)

    def resync(self) -> None:
        """A sequence was asked for again."""
        self._resyncs.inc()

    def set_estimates(self, acceptance_rate: float, miss_power_law: Mapping[str, tuple[float, float]]) -> None:
        """New estimates; ``miss_power_law`` maps "rejection" and "acceptance" to (c, r)."""
        self._acceptance.set(acceptance_rate)
        for after, (constant, exponent) in miss_power_law.items():
            self._power_law.labels(after, "c").set(constant)
            self._power_law.labels(after, "r").set(exponent)

    def set_transports(self, transports: Iterable[str]) -> None:
        """Transports of draft distributions in use now."""
        self._transport.set(transports)

    def dense_distributions(self, num_bytes: int) -> None:
        """Dense draft distributions were sent or received. May be called from any thread."""
        self._dense_bytes.inc(num_bytes)

    def set_engine(self, *, attention_backend: str, dtype: str, device: str) -> None:
        """What the engine runs with."""
        self._engine.set(self._model_name, attention_backend, dtype, device)


class RouterMetrics:
    """Metrics of one router process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        registry = self.registry
        self._streams = Gauge("specpool_streams_running", "Streams open to clients.", registry=registry)
        self._requests = Counter("specpool_requests", "Requests by status.", ["code"], registry=registry)
        self._duration = Histogram(
            "specpool_request_duration_seconds", "Whole requests.", buckets=_REQUEST_BUCKETS_S, registry=registry
        )
        self._failovers = Counter("specpool_failovers", "Streams moved to another target.", registry=registry)
        self._refused = Counter("specpool_quota_refusals", "Requests over quota.", ["tenant"], registry=registry)
        self._store_up = Gauge("specpool_session_store_up", "1: the session store answers.", registry=registry)
        self._pods = Gauge("specpool_pods", "Pods known, by role and state.", ["role", "state"], registry=registry)
        self._tenants = TenantTokens(registry)
        self._refused_cap = LabelCap()

    def stream_started(self) -> None:
        """A client's stream began."""
        self._streams.inc()

    def stream_ended(self, code: str, seconds: float) -> None:
        """It ended with this gRPC status code name."""
        self._streams.dec()
        self._requests.labels(code).inc()
        self._duration.observe(seconds)

    def tenant_tokens(self, tenant: str, *, num_prompt_tokens: int = 0, num_completion_tokens: int = 0) -> None:
        """Tokens of a tenant's request."""
        self._tenants.add(tenant, "prompt", num_prompt_tokens)
        self._tenants.add(tenant, "completion", num_completion_tokens)

    def quota_refused(self, tenant: str) -> None:
        """A request was refused for its tenant's quota."""
        self._refused.labels(self._refused_cap(tenant)).inc()

    def failover(self) -> None:
        """A stream was moved to another target."""
        self._failovers.inc()

    def set_session_store_up(self, up: bool) -> None:
        """Whether the session store answered last time."""
        self._store_up.set(up)

    def set_pods(self, role: str, *, num_reachable: int, num_unreachable: int) -> None:
        """Pods of a role: "target" or "speculator"."""
        self._pods.labels(role, "reachable").set(num_reachable)
        self._pods.labels(role, "unreachable").set(num_unreachable)


def serve_metrics(registry: CollectorRegistry, port: int, host: str = "0.0.0.0") -> int:
    """Serve ``registry`` over HTTP in a background thread; port 0 is any free one. Returns the bound port."""
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error}", metadata={"field": "metrics_port", "value": port}
        ) from error
    return int(server.server_port)


def exported_metric_names() -> dict[str, frozenset[str]]:
    """Every series name each role exports, as queries spell it (``_total``, ``_bucket``, ...), by role."""
    registries = {
        "target": TargetMetrics("model").registry,
        "speculator": SpeculatorMetrics("model").registry,
        "router": RouterMetrics().registry,
    }
    return {role: frozenset(_series_names(registry)) for role, registry in registries.items()}


def _series_names(registry: CollectorRegistry) -> Iterable[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    for family in registry.collect():
        yield from (family.name + suffix for suffix in suffixes.get(family.type, ("",)))


class _Factory:
    """Metrics with the one label ``model_name``, as children ready for use."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return metric.labels(self._model_name)


class _TransportInfo:
    """``specpool_transport_info``: 1 for each transport in use."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(
            "specpool_transport_info",
            "1: this transport of draft distributions is in use.",
            ["transport"],
            registry=registry,
        )
        self._known: set[str] = set()

    def set(self, transports: Iterable[str]) -> None:
        used = set(transports)
        self._known |= used
        for transport in self._known:
            self._gauge.labels(transport).set(transport in used)


class _EngineInfo:
    """``specpool_engine_info``: 1, with what the engine runs with as labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["model_name", "attention_backend", "dtype", "device"]
        self._gauge = Gauge("specpool_engine_info", "1; see the labels.", labels, registry=registry)

    def set(self, *values: str) -> None:
        self._gauge.labels(*values).set(1)


def _dense_bytes(registry: CollectorRegistry) -> Counter:
    return Counter(
        "specpool_dense_distribution_bytes",
        "Bytes of dense draft distributions sent or received over process groups.",
        registry=registry,
    )


def _children(metric: _Metric, values: Iterable[str]) -> dict[str, _Metric]:
    return {value: metric.labels(value) for value in values}


def _add(counter: Counter, amount: int) -> None:
    if amount:
        counter.inc(amount)
