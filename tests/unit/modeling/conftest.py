"""Helper modules of these tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a folder of tests is no package: its helper module is loaded by path.
if "small_tokenizers" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("small_tokenizers", Path(__file__).with_name("small_tokenizers.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["small_tokenizers"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["small_tokenizers"])
