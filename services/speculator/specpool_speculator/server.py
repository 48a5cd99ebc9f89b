"""The speculator process: load the draft model, serve, stop gracefully."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specpool.errors import SpecPoolError
from specpool.process import freeze_loaded_objects, set_cpu_affinity, set_num_threads
from specpool.rpc.server import add_standard_services, bind, create_server, run_until_stopped
from specpool.telemetry import tracing
from specpool.telemetry.metrics import serve_metrics
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.distributions.transport import offered
from specpool_engine.modeling.device_sharing import DeviceShare, await_mps, describe_sharing, open_stream, use_stream
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.interface import CausalModel, Segment, close_model, watch_model
from specpool_engine.modeling.load_model import load_model, parse_device
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism, describe_device
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.engine.drafter import Drafter
from specpool_speculator.engine.engine import EngineThread
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
    offered(config.distribution_transport, config.device)  # refuses what cannot be had, before the model is loaded
    set_cpu_affinity(config.cpu_affinity)
    set_num_threads(config.num_threads)
    model, tokenizer, stream = await asyncio.to_thread(_load, config, on_progress)
    traces = tracing.setup("specpool-speculator", config.id, config.otlp_endpoint, config.trace_sampling_ratio)
    metrics = SpeculatorMetrics(served_name(config))
    device = _device_name(config, model)
    metrics.set_engine(attention_backend=config.attention_backend, dtype=config.dtype, device=device)
    metrics.set_transports(("grpc",))
    if config.metrics_port is not None:
        _logger.info("metrics on port %d", serve_metrics(metrics.registry, config.metrics_port))

    stopping, failure = stop or asyncio.Event(), asyncio.get_running_loop().create_future()
    engine = make_engine(config, model, tokenizer, metrics, _failing(stopping, failure), stream)
    watch_model(model, engine.abort)
    server = create_server()
    endpoint = bind(server, config.listen)
    service = SpeculatorService(engine, _identity(config, model, tokenizer, endpoint), config, metrics)
    speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(service, server)
    health = add_standard_services(server, speculator_pb2.DESCRIPTOR)
    freeze_loaded_objects()
    engine.start()
    try:
        await server.start()
        await health.set_serving()
        _logger.info("speculator %s serves %s on %s", config.id, served_name(config), endpoint)
        if on_ready is not None:
            on_ready(endpoint)
        await run_until_stopped(server, service.drain, health=health, grace_s=config.drain_grace_s, stop=stopping)
    finally:
        await asyncio.to_thread(engine.stop)
        await asyncio.to_thread(close_model, model)
        await traces.aclose()
    if failure.done():
        raise failure.result()


def served_name(config: SpeculatorConfig) -> str:
    """Name of the draft model in status and metrics."""
    return config.model_name or config.model.rstrip("/").rpartition("/")[2]


def make_engine(
    config: SpeculatorConfig,
    model: CausalModel,
    tokenizer: Any,
    metrics: SpeculatorMetrics,
    on_failure: Callable[[BaseException], None],
    stream: Any = None,
) -> EngineThread:
    """The engine over a loaded model, not started; it computes on `stream`."""
    end_tokens = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return EngineThread(
        lambda: Drafter(model, config, end_tokens=end_tokens, on_draft=metrics.tenant_tokens),
        metrics,
        num_kv_blocks=model.pool.num_blocks,
        num_free_kv_blocks=lambda: model.pool.num_free,
        before_start=partial(use_stream, model.device, stream),
        on_failure=on_failure,
    )


def device_share(config: SpeculatorConfig) -> DeviceShare:
    """What this process takes of its device."""
    return DeviceShare(
        memory=config.device_memory_share, multiprocessors=config.sm_share, priority=config.stream_priority
    )


def _load(config: SpeculatorConfig, on_progress: Progress) -> tuple[CausalModel, Any, Any]:
    """Model, tokenizer, and the engine's stream."""
    await_mps(config.device)
    stream = open_stream(parse_device(config.device), device_share(config))
    tokenizer = load_tokenizer(config.model, on_progress=on_progress)
    model = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        num_blocks=config.num_kv_blocks or None,
        kv_cache_bytes=config.kv_cache_bytes or None,
        memory_share=config.device_memory_share,
        block_size=config.block_size,
        attention_backend=config.attention_backend,
        weights=config.weights,
        compile_model=config.compile,
        cuda_graphs=config.cuda_graphs,
        tensor_parallel=TensorParallelism(
            size=config.tensor_parallel,
            start_timeout_s=config.follower_start_timeout_s,
            step_timeout_s=config.follower_step_timeout_s,
        ),
        num_frequent_tokens=config.draft_vocab_size,
        other_tokens=tokenizer.all_special_ids,
        stream=stream,
        on_progress=on_progress,
    )
    _warm_up(model, config.row_budget)
    return model, tokenizer, stream


@torch.inference_mode()
def _warm_up(model: CausalModel, num_rows: int) -> None:
    """First forwards allocate and compile: do that before a target waits for one."""
    kvs = [SequenceKV(model.pool) for _ in range(min(num_rows, model.pool.num_blocks))]
    for kv in kvs[:1], kvs:
        model.forward([Segment(kv=one, tokens=[0]) for one in kv])
        for one in kv:
            one.free()


def _device_name(config: SpeculatorConfig, model: CausalModel) -> str:
    return describe_device(model.device, config.tensor_parallel) + describe_sharing(device_share(config))


def _identity(config: SpeculatorConfig, model: CausalModel, tokenizer: Any, endpoint: str) -> SpeculatorIdentity:
    return SpeculatorIdentity(
        peer=types_pb2.Peer(id=config.id, incarnation=secrets.randbits(64), endpoint=config.advertise or endpoint),
        model=types_pb2.ModelInfo(
            name=served_name(config),
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            dtype=config.dtype,
            attention_backend=config.attention_backend,
            device=_device_name(config, model),
        ),
        num_tokens=len(tokenizer),
    )


def _failing(stopping: asyncio.Event, failure: asyncio.Future[SpecPoolError]) -> Callable[[BaseException], None]:
    """Ends the process when the engine dies: a server without its engine must not look alive."""
    loop = asyncio.get_running_loop()

    def on_loop(error: BaseException) -> None:
        if not failure.done() and isinstance(error, SpecPoolError):
            failure.set_result(error)
        stopping.set()

    def on_engine_thread(error: BaseException) -> None:
        loop.call_soon_threadsafe(on_loop, error)

    return on_engine_thread
