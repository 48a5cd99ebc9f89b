"""Names of exported series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry


def series_names(registry: CollectorRegistry) -> frozenset[str]:
    """Every series name that a registry exports, as queries spell it (``_total``, ``_bucket``, ...)."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return frozenset(
        family.name + suffix for family in registry.collect() for suffix in suffixes.get(family.type, ("",))
    )
