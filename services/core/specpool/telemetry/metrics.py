"""What the metrics of the three services have in common; each service keeps its own in its file `metrics.py`.

Targets keep vLLM's names, so that dashboards and autoscalers made for it work; the rest has the prefix ``specpool_``.
Children of labelled metrics are looked up once, so that a step costs a few additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from specpool.errors import ConfigError

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)

MAX_TENANT_LABELS: Final = 100
OTHER: Final = "other"

STEP_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.35, 0.5, 1, 2, 5)
REQUEST_BUCKETS_S: Final = (0.1, 0.3, 0.5, 1, 1.5, 2, 3, 5, 8, 12, 20, 30, 45, 60, 120, 240, 480, 960)

# Each counter and histogram would otherwise export a second series with its creation time.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class CountedHistogram(Collector):
    """A histogram that takes many equal observations at once, and is put together when it is scraped.

    One thread observes. What another one collects meanwhile may lack an observation in the sum or in the counts.
    """

    def __init__(
        self, name: str, text: str, labels: Mapping[str, str], buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """`buckets` are the upper bounds, rising."""
        self._name, self._text, self._labels = name, text, labels
        self._bounds = list(buckets)
        self._names = [*map(floatToGoString, buckets), "+Inf"]
        self._counts = [0] * len(self._names)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """Take in `count` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The name, so that no other metric takes it; called by the registry."""
        yield HistogramMetricFamily(self._name, self._text, labels=list(self._labels))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """All buckets; called by the registry for a scrape."""
        total, counts = self._sum, accumulate(list(self._counts))
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        buckets = [(name, float(count)) for name, count in zip(self._names, counts, strict=True)]
        family.add_metric(list(self._labels.values()), buckets, total)
        yield family


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


def serve_metrics(registry: CollectorRegistry, port: int, host: str = "0.0.0.0") -> int:
    """Serve ``registry`` over HTTP in a background thread; port 0 is any free one. Returns the bound port."""
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error}", metadata={"field": "metrics_port", "value": port}
        ) from error
    return int(server.server_port)


class TransportInfo:
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


class EngineInfo:
    """``specpool_engine_info``: 1, with what the engine runs with as labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["model_name", "attention_backend", "dtype", "device"]
        self._gauge = Gauge("specpool_engine_info", "1; see the labels.", labels, registry=registry)

    def set(self, *values: str) -> None:
        self._gauge.labels(*values).set(1)


def dense_bytes(registry: CollectorRegistry) -> Counter:
    return Counter(
        "specpool_dense_distribution_bytes",
        "Bytes of dense draft distributions sent or received over process groups.",
        registry=registry,
    )


def children(metric: _Metric, values: Iterable[str]) -> dict[str, _Metric]:
    return {value: metric.labels(value) for value in values}


def add(counter: Counter, amount: int) -> None:
    if amount:
        counter.inc(amount)
