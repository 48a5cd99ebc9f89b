"""Start, wire and stop a target process."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from specpool.discovery import directory
from specpool.process import freeze_loaded_objects, set_cpu_affinity, set_num_threads
from specpool.rpc.server import add_standard_services, bind, create_server, run_until_stopped
from specpool.telemetry import tracing
from specpool.telemetry.metrics import serve_metrics
from specpool.v1 import speculator_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_engine.distributions.transport import offered
from specpool_engine.modeling.device_sharing import DeviceShare, await_mps, describe_sharing, open_stream, use_stream
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.interface import CausalModel, close_model, watch_model
from specpool_engine.modeling.load_model import load_model, parse_device
from specpool_engine.modeling.spec import ModelKind, ModelSpec
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism, describe_device
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint
from specpool_target.config import TargetConfig
from specpool_target.engine.engine import EngineThread
from specpool_target.links.handshake import PROTOCOL_VERSION
from specpool_target.links.link import LinkRegistry
from specpool_target.links.receiving_group import DenseReceiver
from specpool_target.metrics import TargetMetrics
from specpool_target.requests.request_reader import RequestReader
from specpool_target.service import TargetService

_logger = logging.getLogger(__name__)
_SWITCH_INTERVAL_S: Final = 0.0005
"""How long one thread may keep the interpreter from the other; the default of 5 ms would show in every round."""
_INCARNATION_BITS: Final = 64


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
    offered(config.distribution_transport, config.device)  # refuses what cannot be had, before the model is loaded
    set_cpu_affinity(config.cpu_affinity)
    set_num_threads(config.num_threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    traces = tracing.setup("specpool-target", config.id, config.otlp_endpoint, config.trace_sampling_ratio)
    model, tokenizer, stream = await asyncio.to_thread(_load, config, on_progress)
    info = _model_info(config, model, tokenizer)
    metrics = TargetMetrics(info.name)
    metrics.set_engine(attention_backend=info.attention_backend, dtype=info.dtype, device=info.device)
    engine = EngineThread(
        model,
        config,
        loop=asyncio.get_running_loop(),
        metrics=metrics,
        on_failed=stopping.set,
        before_start=partial(_prepare_engine_thread, config, model, stream),
    )
    watch_model(model, engine.abort)
    info.max_context = engine.max_context
    peer = types_pb2.Peer(id=config.id, incarnation=secrets.randbits(_INCARNATION_BITS))
    receiver = DenseReceiver(
        device=model.device, vocab_size=model.vocab_size, on_received=metrics.dense_distributions
    )  # fmt: skip
    links = LinkRegistry(partial(_hello, peer, info, config), engine, receiver)
    server = create_server()
    reader = RequestReader(
        model_name=info.name,
        vocab_size=model.vocab_size,
        codec=TextCodec(tokenizer),
        eos_token_ids=end_token_ids(model, tokenizer),
        max_lookahead=config.max_lookahead,
    )
    service = TargetService(
        engine,
        links,
        reader,
        peer=lambda: peer,
        model=info,
        connect_deadline_s=config.connect_deadline_ms / 1e3,
        directory=speculators,
    )
    target_pb2_grpc.add_TargetServiceServicer_to_server(service, server)
    health = add_standard_services(server, target_pb2.DESCRIPTOR)
    bound = bind(server, config.listen)
    peer.endpoint = config.advertise or bound
    freeze_loaded_objects()
    engine.start()
    try:
        await speculators.start()
        await asyncio.to_thread(engine.wait_ready)
        if config.metrics_port is not None:
            _logger.info("metrics on port %d", serve_metrics(metrics.registry, config.metrics_port))
        await server.start()
        await health.set_serving()
        _logger.info("target %s serves %s on %s", config.id, info.name, bound)
        if on_ready is not None:
            on_ready(bound)
        await run_until_stopped(server, service.drain, health=health, grace_s=config.drain_grace_s, stop=stopping)
    finally:
        await speculators.close()
        await links.close()
        engine.stop()
        await asyncio.to_thread(engine.join, 10.0)
        await asyncio.to_thread(close_model, model)
        await traces.aclose()
    if engine.failure is not None:
        raise engine.failure


def _prepare_engine_thread(config: TargetConfig, model: CausalModel, stream: Any) -> None:
    """What torch and CUDA keep per thread."""
    set_num_threads(config.num_threads)
    use_stream(model.device, stream)


def device_share(config: TargetConfig) -> DeviceShare:
    """What this process takes of its device."""
    return DeviceShare(memory=config.device_memory_share, priority=config.stream_priority)


def _load(config: TargetConfig, on_progress: Progress) -> tuple[CausalModel, Any, Any]:
    """Model, tokenizer, and the engine's stream."""
    await_mps(config.device)
    stream = open_stream(parse_device(config.device), device_share(config))
    spec = ModelSpec.parse(config.model)
    model = load_model(
        spec,
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
        stream=stream,
        on_progress=on_progress,
    )
    return model, load_tokenizer(spec, on_progress=on_progress), stream


def _model_info(config: TargetConfig, model: CausalModel, tokenizer: Any) -> types_pb2.ModelInfo:
    return types_pb2.ModelInfo(
        name=config.model_name or default_model_name(config.model),
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=config.dtype,
        attention_backend=config.attention_backend,
        device=describe_device(model.device, config.tensor_parallel) + describe_sharing(device_share(config)),
    )


def default_model_name(model: str) -> str:
    """Last part of the id or path."""
    spec = ModelSpec.parse(model)
    return spec.kind.value if spec.kind is not ModelKind.TRANSFORMERS else spec.source.rstrip("/").rsplit("/", 1)[-1]


def _hello(peer: types_pb2.Peer, info: types_pb2.ModelInfo, config: TargetConfig) -> speculator_pb2.Hello:
    return speculator_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        target=peer,
        model=info,
        transports=[transport.value for transport in offered(config.distribution_transport, config.device)],
        max_lookahead=config.max_lookahead,
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
