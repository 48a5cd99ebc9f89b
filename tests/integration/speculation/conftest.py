"""Engines that are no targets of ours, and speculators to script."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a folder of tests is no package: its helper module is loaded by path.
if "speculation_engine" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("speculation_engine", Path(__file__).with_name("engine.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["speculation_engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["speculation_engine"])

from speculation_engine import pool_for, speculator_for

__all__ = ["pool_for", "speculator_for"]
