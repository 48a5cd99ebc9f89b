"""The speculator process: load the draft model, serve, stop gracefully."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import partial

from specpool.errors import EngineFailed
from specpool.process import freeze_loaded_objects
from specpool.rpc.server import add_standard_services, bind, create_server, run_until_stopped
from specpool.shutdown import CLOSE_S, close_within
from specpool.telemetry import tracing
from specpool.telemetry.metrics import serve_metrics
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.interface import CausalModel, Segment
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.runtime.load_engine import LoadedEngine, load_engine, prepare_process
from specpool_engine.runtime.run_engine import running
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.engine.drafter import Drafter
from specpool_speculator.engine.engine import SpeculatorEngine
from specpool_speculator.metrics import SpeculatorMetrics
from specpool_speculator.service import SpeculatorIdentity, SpeculatorService

_logger = logging.getLogger(__name__)


async def serve(
    config: SpeculatorConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_progress: Progress = no_progress,
    stop: asyncio.Event | None = None,
) -> None:
    """Run until SIGTERM, SIGINT or `stop`.

    Args:
        config: of this process.
        on_ready: called with the bound host:port once it serves.
        on_progress: told about download and load.
        stop: another way to end.
    """
    prepare_process(config, config.distribution_transport)
    loaded = await asyncio.to_thread(
        load_engine,
        config,
        on_progress,
        weights=config.weights,
        sm_share=config.sm_share,
        num_frequent_tokens=config.draft_vocab_size,
    )
    info = loaded.info
    traces = tracing.setup("specpool-speculator", config.id, config.otlp_endpoint, config.trace_sampling_ratio)
    metrics = SpeculatorMetrics(info.name)
    metrics.set_engine(attention_backend=info.attention_backend, dtype=info.dtype, device=info.device)
    metrics.set_transports(("grpc",))
    if config.metrics_port is not None:
        _logger.info("metrics on port %d", serve_metrics(metrics.registry, config.metrics_port))

    stopping = stop or asyncio.Event()
    engine = make_engine(config, loaded, metrics, lambda error: stopping.set())
    server = create_server()
    endpoint = bind(server, config.listen)
    peer = types_pb2.Peer(id=config.id, incarnation=secrets.randbits(64), endpoint=config.advertise or endpoint)
    identity = SpeculatorIdentity(peer=peer, model=info, num_tokens=len(loaded.tokenizer))
    service = SpeculatorService(engine, identity, config, metrics)
    speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(service, server)
    health = add_standard_services(server, speculator_pb2.DESCRIPTOR)
    freeze_loaded_objects()
    try:
        async with running(engine.thread, loaded.model, config.stall_timeout_s):
            await server.start()
            await health.set_serving()
            _logger.info("speculator %s serves %s on %s", config.id, info.name, endpoint)
            if on_ready is not None:
                on_ready(endpoint)
            await run_until_stopped(server, service.drain, health=health, grace_s=config.drain_grace_s, stop=stopping)
    finally:
        await close_within(CLOSE_S, traces=traces.aclose())


def make_engine(
    config: SpeculatorConfig,
    loaded: LoadedEngine,
    metrics: SpeculatorMetrics,
    on_failed: Callable[[EngineFailed], None],
) -> SpeculatorEngine:
    """Make the engine over a loaded model; it is not started."""
    end_token = loaded.tokenizer.eos_token_id
    end_tokens = frozenset(() if end_token is None else (end_token,))
    return SpeculatorEngine(
        lambda: Drafter(loaded.model, config, end_tokens=end_tokens, on_draft=metrics.tenant_tokens),
        metrics,
        loaded.model.pool,
        loop=asyncio.get_running_loop(),
        on_failed=on_failed,
        warm_up=partial(_warm_up, loaded.model, config.row_budget),
        before_start=loaded.prepare_thread,
    )


def _warm_up(model: CausalModel, num_rows: int) -> None:
    """Run the first forwards, which allocate and compile, before a target waits for one."""
    kvs = [SequenceKV(model.pool) for _ in range(min(num_rows, model.pool.num_blocks))]
    for kv in kvs[:1], kvs:
        model.forward([Segment(kv=one, tokens=[0]) for one in kv])
        for one in kv:
            one.free()
