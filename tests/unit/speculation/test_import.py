"""The library costs an engine next to nothing to import, and brings nothing of ours that it does not need."""

from __future__ import annotations

import statistics
import subprocess
import sys

PROBE = """
import sys, time
started = time.process_time()
import specpool.speculation
print(time.process_time() - started)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
MAX_S = 0.3


def test_it_imports_in_a_moment_and_without_torch():
    outputs = [
        subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split("\n")
        for _ in range(5)
    ]
    assert statistics.median(float(seconds) for seconds, *_ in outputs) < MAX_S
    modules = set(outputs[0][1].split())
    assert not modules & {"torch", "transformers", "numpy", "redis", "kubernetes", "prometheus_client"}
    assert {name for name in modules if name.startswith("specpool")} == {"specpool"}
