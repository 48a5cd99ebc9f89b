"""Prometheus metrics of one speculator. They observe and never steer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specpool.telemetry.metrics import STEP_BUCKETS_S, EngineInfo, TenantTokens, TransportInfo, add, dense_bytes
from specpool_speculator.engine.step_stats import DraftStepStats


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
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._forward = Histogram(
            "specpool_draft_forward_duration_seconds",
            "Forwards of the draft model.",
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._draft_tokens = Counter("specpool_draft_tokens", "Tokens drafted.", registry=registry)
        self._prefix_queries = Counter(
            "specpool_prefix_cache_queries",
            "Tokens of new sequences, looked up in the prefix cache.",
            registry=registry,
        )
        self._prefix_hits = Counter(
            "specpool_prefix_cache_hits", "Tokens of these that the prefix cache had.", registry=registry
        )
        self._entries = Counter("specpool_table_entries", "Table entries pushed.", registry=registry)
        self._dropped = Counter("specpool_dropped_branches", "Branches ruled out before use.", registry=registry)
        self._stale = Counter(
            "specpool_stale_messages",
            "Messages dropped because their incarnation, sequence or round has passed.",
            registry=registry,
        )
        self._resyncs = Counter("specpool_resyncs", "Sequences asked for again.", registry=registry)
        self._refused = Counter(
            "specpool_refused_sequences", "Sequences not taken, or given up, by reason.", ["reason"], registry=registry
        )
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
        self._transport = TransportInfo(registry)
        self._dense_bytes = dense_bytes(registry)
        self._engine = EngineInfo(registry)

    def observe_step(self, step: DraftStepStats) -> None:
        """Take in one step."""
        self._rows.set(step.num_rows)
        self._step.observe(step.step_s)
        self._forward.observe(step.forward_s)
        self._sequences.set(step.num_sequences)
        self._targets.set(step.num_targets)
        self._kv_usage.set(step.kv_cache_usage)
        add(self._draft_tokens, step.num_draft_tokens)
        add(self._entries, step.num_table_entries)
        add(self._dropped, step.num_dropped_branches)
        add(self._stale, step.num_stale_messages)
        add(self._prefix_queries, step.num_prefix_queried_tokens)
        add(self._prefix_hits, step.num_prefix_hit_tokens)

    def set_idle(self, *, num_sequences: int, num_targets: int, kv_cache_usage: float) -> None:
        """Set the gauges between steps: when there is nothing to draft, no step reports it."""
        self._rows.set(0)
        self._sequences.set(num_sequences)
        self._targets.set(num_targets)
        self._kv_usage.set(kv_cache_usage)

    def tenant_tokens(self, tenant: str, num_draft_tokens: int) -> None:
        """Count tokens that were drafted for ``tenant``."""
        self._tenants.add(tenant, "draft", num_draft_tokens)

    def resync(self) -> None:
        """Count a sequence that was asked for again."""
        self._resyncs.inc()

    def refused(self, reason: str, num_sequences: int) -> None:
        """Count sequences that were refused, by reason."""
        self._refused.labels(reason).inc(num_sequences)

    def set_estimates(self, acceptance_rate: float, miss_power_law: Mapping[str, tuple[float, float]]) -> None:
        """Set the estimates; ``miss_power_law`` maps "rejection" and "acceptance" to (c, r)."""
        self._acceptance.set(acceptance_rate)
        for after, (constant, exponent) in miss_power_law.items():
            self._power_law.labels(after, "c").set(constant)
            self._power_law.labels(after, "r").set(exponent)

    def set_transports(self, transports: Iterable[str]) -> None:
        """Set which transports of draft distributions are in use."""
        self._transport.set(transports)

    def dense_distributions(self, num_bytes: int) -> None:
        """Count bytes of dense draft distributions, sent or received. May be called from any thread."""
        self._dense_bytes.inc(num_bytes)

    def set_engine(self, *, attention_backend: str, dtype: str, device: str) -> None:
        """Set what the engine runs with."""
        self._engine.set(self._model_name, attention_backend, dtype, device)
