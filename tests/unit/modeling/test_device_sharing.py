"""Two engines on one GPU: how memory and multiprocessors are divided, and what is refused with which words."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specpool.errors import ConfigError, InvalidArgument
from specpool_engine.modeling import device_sharing
from specpool_engine.modeling.device_sharing import (
    MPS_DIRECTORY,
    DeviceShare,
    await_mps,
    check_share,
    describe_sharing,
    find_mps,
    num_multiprocessors,
    open_stream,
    use_stream,
)
from specpool_engine.modeling.kv_budget import CUDA_CONTEXT_BYTES, GPU_KV_CACHE_SHARE, KVBudget, bytes_left
from specpool_engine.modeling.load_model import parse_device
from specpool_speculator.config import SpeculatorConfig
from specpool_target.config import TargetConfig

GIB = 1 << 30
CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def mps(tmp_path: Path) -> dict[str, str]:
    """Environment in which a daemon answers."""
    (tmp_path / "control").touch()
    return {MPS_DIRECTORY: str(tmp_path)}


def test_a_cuda_device_has_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of torch.cuda takes no device without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda") == torch.device("cuda", 0)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    assert parse_device("cpu") == torch.device("cpu")


def test_shares_make_the_cache_independent_of_who_starts_first() -> None:
    def target(free: int) -> int:
        return bytes_left(total=80 * GIB, free=free, used=16 * GIB, share=0.75)

    alone, after_the_draft = target(free=63 * GIB), target(free=(63 - 16) * GIB)
    assert alone == after_the_draft == int((44 * GIB - CUDA_CONTEXT_BYTES) * GPU_KV_CACHE_SHARE)
    draft = bytes_left(total=80 * GIB, free=63 * GIB, used=1 * GIB, share=0.2)
    assert alone + draft + (16 + 1) * GIB + 2 * CUDA_CONTEXT_BYTES < 0.95 * 80 * GIB


def test_a_share_never_takes_more_than_is_free_and_the_whole_takes_what_is() -> None:
    assert bytes_left(total=80 * GIB, free=4 * GIB, used=16 * GIB, share=0.75) == int(4 * GIB * GPU_KV_CACHE_SHARE)
    assert bytes_left(total=80 * GIB, free=10 * GIB, used=70 * GIB, share=1.0) == int(10 * GIB * GPU_KV_CACHE_SHARE)
    assert bytes_left(total=80 * GIB, free=40 * GIB, used=16 * GIB, share=0.1) == 0


def test_a_share_without_room_beside_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 * GIB)
    assert KVBudget(memory_share=0.5).blocks(1 << 20, CUDA) > 0
    with pytest.raises(InvalidArgument, match=r"device_memory_share 0\.2 has no room for a KV cache") as caught:
        KVBudget(memory_share=0.2).blocks(1 << 20, CUDA)
    assert caught.value.metadata["field"] == "device_memory_share"


@pytest.mark.parametrize(
    ("total", "share", "expected"), [(132, 0.25, 32), (132, 0.01, 8), (132, 0.999, 128), (4, 0.5, 4)]
)
def test_multiprocessors_come_in_groups(total: int, share: float, expected: int) -> None:
    assert num_multiprocessors(total, share) == expected


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (DeviceShare(memory=0.5), "device_memory_share is 0.5"),
        (DeviceShare(multiprocessors=0.5), "sm_share is 0.5"),
        (DeviceShare(priority="high"), "stream_priority is high"),
    ],
)
def test_a_cpu_is_not_shared_out(share: DeviceShare, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{words}, and the device is cpu: only a GPU is shared out") as caught:
        open_stream(torch.device("cpu"), share)
    assert caught.value.reason == "DEVICE_SHARING_UNAVAILABLE"


def test_the_whole_device_needs_nothing() -> None:
    assert open_stream(torch.device("cpu"), DeviceShare()) is None
    use_stream(torch.device("cpu"), None)
    assert describe_sharing(DeviceShare()) == ""


class Context:
    """Stands for torch's green context where torch has none."""

    def Stream(self) -> str:
        return "a stream of the green context"


@pytest.mark.parametrize(
    ("module", "environment", "words"),
    [
        (None, {}, "torch .* has no green contexts"),
        (SimpleNamespace(SUPPORTED=False), {}, "torch .* has no green contexts"),
        (SimpleNamespace(SUPPORTED=True, GreenContext=object), {}, "gives no stream of a green context"),
        (SimpleNamespace(SUPPORTED=True, GreenContext=Context), {MPS_DIRECTORY: "/nowhere"}, "in turns"),
        (
            SimpleNamespace(SUPPORTED=True, GreenContext=Context),
            {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40"},
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is 40, which overrides",
        ),
    ],
)
def test_green_contexts_that_cannot_be_had_are_refused_naming_what_is_missing(
    module: Any, environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_sharing, "_green_contexts", lambda: module)
    with pytest.raises(InvalidArgument, match=f"sm_share 0.5 cannot be used: .*{words}") as caught:
        check_share(CUDA, DeviceShare(multiprocessors=0.5), mps(tmp_path) | environment)
    assert caught.value.reason == "GREEN_CONTEXTS_UNAVAILABLE"


def test_a_driver_without_green_contexts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    created = list[dict[str, int]]()

    class Factory(Context):
        @staticmethod
        def create(**options: int) -> Context:
            created.append(options)
            if len(created) > 1:
                raise RuntimeError("driver too old\nstack")
            return Context()

    module = SimpleNamespace(SUPPORTED=True, GreenContext=Factory)
    monkeypatch.setattr(device_sharing, "_green_contexts", lambda: module)
    monkeypatch.setattr(device_sharing, "_entered", [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    for name, value in mps(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", raising=False)
    assert open_stream(CUDA, DeviceShare(multiprocessors=0.25)) == "a stream of the green context"
    assert created == [{"num_sms": 32, "device_id": 0}]
    with pytest.raises(InvalidArgument, match=r"cannot be used: driver too old$"):
        open_stream(CUDA, DeviceShare(multiprocessors=0.25))


def test_an_mps_daemon_that_the_environment_names_is_waited_for(tmp_path: Path) -> None:
    environment = {MPS_DIRECTORY: str(tmp_path)}
    assert find_mps(environment) is None
    late = threading.Timer(0.2, (tmp_path / "control").touch)
    late.start()
    await_mps("cuda", environment, timeout_s=10.0)
    assert find_mps(environment) == tmp_path
    late.join()


def test_an_mps_daemon_that_does_not_come_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no nvidia-cuda-mps-control answers there") as caught:
        await_mps("cuda:0", {MPS_DIRECTORY: str(tmp_path)}, timeout_s=0.0)
    assert caught.value.reason == "MPS_UNAVAILABLE"
    await_mps("cpu", {MPS_DIRECTORY: str(tmp_path)}, timeout_s=0.0)
    await_mps("cuda", {}, timeout_s=0.0)


def test_status_says_how_a_device_is_shared(tmp_path: Path) -> None:
    share = DeviceShare(memory=0.75, priority="high")
    assert describe_sharing(share, mps(tmp_path)) == ", shared by MPS, 75% of its memory"
    without = describe_sharing(share, {MPS_DIRECTORY: str(tmp_path / "none")})
    assert without == ", shared in turns, without MPS, 75% of its memory"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device_memory_share": 0.0}, "device_memory_share must be more than 0, got 0.0"),
        ({"sm_share": 1.5}, "sm_share must be at most 1, got 1.5"),
        ({"stream_priority": "low"}, "stream_priority must be 'normal' or 'high', got 'low'"),
        ({"sm_share": 0.5, "stream_priority": "high"}, "sm_share must be 1 where stream_priority is high"),
        ({"sm_share": 0.5, "tensor_parallel": 2}, "sm_share must be 1 where tensor_parallel is not 1"),
        ({"stream_priority": "high", "tensor_parallel": 2}, "stream_priority must be normal where tensor_parallel"),
    ],
)
def test_settings_that_can_never_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SpeculatorConfig(model="m", **settings)
    if "sm_share" not in settings:
        with pytest.raises(ConfigError, match=words):
            TargetConfig(model="m", **settings)


@pytest.mark.gpu
@needs_gpu
def test_a_high_priority_stream_on_a_gpu() -> None:
    stream = open_stream(CUDA, DeviceShare(priority="high"))
    seen = list[int]()

    def engine() -> None:
        use_stream(CUDA, stream)
        seen.append(torch.cuda.current_stream(CUDA).cuda_stream)

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert seen == [stream.cuda_stream]
    assert stream.priority < torch.cuda.current_stream(CUDA).priority
