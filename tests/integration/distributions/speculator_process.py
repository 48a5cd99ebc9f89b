"""A real speculator on a toy model in a process of its own: prints its endpoint. For test_dense_rejection.py."""

from __future__ import annotations

import asyncio
import sys

from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve

config = SpeculatorConfig(model=sys.argv[1], max_lookahead=4, num_kv_blocks=512, distribution_transport="gloo")
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True)))
