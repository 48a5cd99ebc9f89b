"""Start, wire and stop a target process."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Final

from specpool.discovery import directory
from specpool.discovery.discovery import Discovery
from specpool.process import freeze_loaded_objects
from specpool.rpc.server import add_standard_services, bind, create_server, run_until_stopped
from specpool.shutdown import CLOSE_S, close_within
from specpool.speculation import PoolEvents, PoolIdentity, SpeculationPool
from specpool.telemetry import tracing
from specpool.telemetry.metrics import serve_metrics
from specpool.v1 import target_pb2, target_pb2_grpc, types_pb2
from specpool_engine.distributions.transport import offered
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.runtime.load_engine import LoadedEngine, load_engine, prepare_process
from specpool_engine.runtime.run_engine import running
from specpool_target.config import TargetConfig
from specpool_target.dense.receiving_group import DenseReceiver
from specpool_target.engine.engine import TargetEngine
from specpool_target.metrics import TargetMetrics
from specpool_target.requests.request_reader import RequestReader
from specpool_target.service import TargetService

_logger = logging.getLogger(__name__)
_INCARNATION_BITS: Final = 64
_MAX_UINT32: Final = 2**32 - 1


async def serve(
    config: TargetConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_progress: Progress = no_progress,
    stop: asyncio.Event | None = None,
) -> None:
    """Run until SIGTERM, SIGINT, `stop`, or a failure of the engine.

    Args:
        config: of this process.
        on_ready: told the bound host:port once the target serves.
        on_progress: told of download and load.
        stop: another way to end it.
    """
    stopping = stop or asyncio.Event()
    speculators = directory.parse(config.speculators, field="speculators")
    labels = directory.parse_labels(config.labels)
    prepare_process(config, config.distribution_transport)
    traces = tracing.setup("specpool-target", config.id, config.otlp_endpoint, config.trace_sampling_ratio)
    loaded = await asyncio.to_thread(load_engine, config, on_progress, weights=config.weights)
    info = loaded.info
    metrics = TargetMetrics(info.name)
    metrics.set_engine(attention_backend=info.attention_backend, dtype=info.dtype, device=info.device)
    peer = types_pb2.Peer(id=config.id, incarnation=secrets.randbits(_INCARNATION_BITS))
    identity = PoolIdentity(peer=peer, model=info, max_lookahead=config.max_lookahead, labels=labels)
    engine = TargetEngine(
        loaded.model,
        config,
        loop=asyncio.get_running_loop(),
        metrics=metrics,
        make_pool=_pool_maker(config, loaded, speculators, identity, metrics),
        on_failed=stopping.set,
        before_start=loaded.prepare_thread,
    )
    server = create_server()
    service = _make_service(engine, loaded, config, peer, speculators)
    target_pb2_grpc.add_TargetServiceServicer_to_server(service, server)
    health = add_standard_services(server, target_pb2.DESCRIPTOR)
    bound = bind(server, config.listen)
    peer.endpoint = config.advertise or bound
    freeze_loaded_objects()
    try:
        await asyncio.wrap_future(engine.pool.start())
        async with running(engine.thread, loaded.model, config.stall_timeout_s):
            if config.metrics_port is not None:
                _logger.info("metrics on port %d", serve_metrics(metrics.registry, config.metrics_port))
            await server.start()
            await health.set_serving()
            _logger.info("target %s serves %s on %s", config.id, info.name, bound)
            if on_ready is not None:
                on_ready(bound)
            await run_until_stopped(server, service.drain, health=health, grace_s=config.drain_grace_s, stop=stopping)
            await close_within(CLOSE_S, pool=engine.pool.aclose())
    finally:
        await close_within(CLOSE_S, pool=engine.pool.aclose(), traces=traces.aclose())


def _pool_maker(
    config: TargetConfig, loaded: LoadedEngine, speculators: Discovery, identity: PoolIdentity, metrics: TargetMetrics
) -> Callable[[PoolEvents], SpeculationPool]:
    """The engine makes the pool: it is the one that hears of what happens there."""
    loop = asyncio.get_running_loop()
    receiver = DenseReceiver(
        transports=offered(config.distribution_transport, config.device),
        device=loaded.model.device,
        vocab_size=loaded.model.vocab_size,
        on_received=metrics.dense_distributions,
    )
    return lambda events: SpeculationPool(
        speculators, identity, loop=loop, events=events, receiver=receiver, flushes_itself=False
    )


def _make_service(
    engine: TargetEngine, loaded: LoadedEngine, config: TargetConfig, peer: types_pb2.Peer, speculators: Discovery
) -> TargetService:
    """The service, and what it tells of the model: how long a context and a prompt can be."""
    info, codec = loaded.info, TextCodec(loaded.tokenizer)
    info.max_context = engine.max_context
    info.max_prompt_chars = min(engine.max_context * codec.max_chars_per_token(), _MAX_UINT32)
    reader = RequestReader(
        model=info,
        codec=codec,
        eos_token_ids=end_token_ids(loaded.model, loaded.tokenizer),
        max_lookahead=config.max_lookahead,
    )
    return TargetService(
        engine,
        reader,
        peer=lambda: peer,
        model=info,
        connect_deadline_s=config.connect_deadline_ms / 1e3,
        directory=speculators,
    )


def end_token_ids(model: CausalModel, tokenizer: Any) -> frozenset[int]:
    """End tokens of the tokenizer and of the model's generation settings (chat models have several)."""
    generation = getattr(getattr(model, "model", None), "generation_config", None)
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
        if isinstance(value, int):
            ids.add(value)
        elif isinstance(value, Iterable):
            ids.update(value)
    return frozenset(ids)
