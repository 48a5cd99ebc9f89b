"""Prometheus metrics of one router. They observe and never steer."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from specpool.telemetry.metrics import REQUEST_BUCKETS_S, LabelCap, TenantTokens


class RouterMetrics:
    """Metrics of one router process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        registry = self.registry
        self._streams = Gauge("specpool_streams_running", "Streams open to clients.", registry=registry)
        self._requests = Counter("specpool_requests", "Requests by status.", ["code"], registry=registry)
        self._duration = Histogram(
            "specpool_request_duration_seconds", "Whole requests.", buckets=REQUEST_BUCKETS_S, registry=registry
        )
        self._failovers = Counter("specpool_failovers", "Streams moved to another target.", registry=registry)
        self._refused = Counter("specpool_quota_refusals", "Requests over quota.", ["tenant"], registry=registry)
        self._store_up = Gauge("specpool_session_store_up", "1: the session store takes writes.", registry=registry)
        self._journal_lag = Gauge(
            "specpool_journal_lag_seconds",
            "Age of the oldest delta that the session store lacks.",
            registry=registry,
        )
        self._pods = Gauge("specpool_pods", "Pods known, by role and state.", ["role", "state"], registry=registry)
        self._tenants = TenantTokens(registry)
        self._refused_cap = LabelCap()

    def stream_started(self) -> None:
        """Count a client's stream that began."""
        self._streams.inc()

    def stream_ended(self, code: str, seconds: float) -> None:
        """Count a client's stream that ended with this gRPC status code name, after ``seconds``."""
        self._streams.dec()
        self._requests.labels(code).inc()
        self._duration.observe(seconds)

    def tenant_tokens(self, tenant: str, *, num_prompt_tokens: int = 0, num_completion_tokens: int = 0) -> None:
        """Count tokens of a tenant's request."""
        self._tenants.add(tenant, "prompt", num_prompt_tokens)
        self._tenants.add(tenant, "completion", num_completion_tokens)

    def quota_refused(self, tenant: str) -> None:
        """Count a request that was refused for its tenant's quota."""
        self._refused.labels(self._refused_cap(tenant)).inc()

    def failover(self) -> None:
        """Count a stream that was moved to another target."""
        self._failovers.inc()

    def set_session_store_up(self, up: bool) -> None:
        """Set whether the session store takes writes."""
        self._store_up.set(up)

    def watch_journal_lag(self, lag_s: Callable[[], float]) -> None:
        """Ask ``lag_s`` whenever somebody wants to know how far the journal is behind."""
        self._journal_lag.set_function(lag_s)

    def set_pods(self, role: str, *, num_reachable: int, num_unreachable: int) -> None:
        """Set the number of pods of a role, "target" or "speculator"."""
        self._pods.labels(role, "reachable").set(num_reachable)
        self._pods.labels(role, "unreachable").set(num_unreachable)
