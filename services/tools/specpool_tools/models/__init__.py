"""Fetching: a catalogue of known models and prompt sets, kept in the user's cache directory.

Nothing here imports torch at module level: `catalogue` and `paths` answer from the file system alone.
"""

from __future__ import annotations

from specpool.paths import cache_directory, models_directory, prompts_directory
from specpool_tools.models.catalogue import CATALOGUE, CatalogueEntry, find_entry, local_directory, resolve_spec

__all__ = [
    "CATALOGUE",
    "CatalogueEntry",
    "cache_directory",
    "find_entry",
    "local_directory",
    "models_directory",
    "prompts_directory",
    "resolve_spec",
]
