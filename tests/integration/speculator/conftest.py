"""What tests of a speculator share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Under --import-mode=importlib a folder of tests is no package: helper modules are loaded by path.
if "extreme_values" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "extreme_values", Path(__file__).parents[2] / "tools" / "extreme_values.py"
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["extreme_values"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["extreme_values"])
