"""What the router must not load."""

from __future__ import annotations

import subprocess
import sys


def test_router_never_loads_torch() -> None:
    code = (
        "import sys, specpool_router.server, specpool.discovery.kubernetes\n"
        "import specpool_tools.local.embedded_store\n"
        "bad = [m for m in sys.modules if m in ('torch', 'transformers', 'kubernetes') "
        "or m.startswith(('specpool.algorithm', 'specpool_engine'))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
