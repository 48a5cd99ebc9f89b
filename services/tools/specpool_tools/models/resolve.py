"""From any model reference to something loadable."""

from __future__ import annotations

from specpool_tools.models.catalogue import resolve_spec


def resolve_model(reference: str) -> str:
    """A catalogue name becomes its fetched directory (`ModelNotFound` says how to fetch it); the rest stays."""
    return resolve_spec(reference)
