"""A model split over two processes computes what it does in one; when one process is lost, the other says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from specpool.errors import FollowerLost, InvalidArgument, KVCacheFull, SpecPoolError
from specpool_engine.modeling.interface import DistributedModel, Segment, close_model, watch_model
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.tensor_parallel.leader import TensorParallelModel
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device, and these tests split a model over CPU processes"
)

VOCAB_SIZE = 97  # does not divide by 2, and neither does the intermediate size
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2 with tied embeddings": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}
PAIR = TensorParallelism(size=2, start_timeout_s=60.0, step_timeout_s=20.0)
SETTINGS: dict[str, Any] = {"dtype": "float32", "num_blocks": 64, "block_size": 4}


def save(architecture: str, path: Path) -> str:
    config_class, model_class, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=95,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        **options,
    )
    model_class(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llama", tmp_path_factory.mktemp("llama"))


@contextmanager
def split(directory: str, parallelism: TensorParallelism = PAIR, **changes: Any) -> Iterator[TensorParallelModel]:
    model = load_model(directory, tensor_parallel=parallelism, **{**SETTINGS, **changes})
    assert isinstance(model, TensorParallelModel)
    try:
        yield model
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid_of(model), signal.SIGCONT)
        model.close()
        assert not runs(pid_of(model))
        assert not dist.is_initialized()


def pid_of(model: TensorParallelModel) -> int:
    (follower,) = model._followers
    return follower.process.pid


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {seconds} s"
        time.sleep(0.02)


def forwards(model: Any) -> list[torch.Tensor]:
    """Chunked prefill, verification, a rejection, branches that diverge in a shared block, a prefix found again."""
    tokens = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    trunk, other = SequenceKV(model.pool), SequenceKV(model.pool)
    run = model.forward
    outputs = [run([Segment(kv=trunk, tokens=tokens[:13], num_logits=0)])]
    outputs.append(run([Segment(kv=trunk, tokens=tokens[13:30], num_logits=3), Segment(kv=other, tokens=tokens[:5])]))
    outputs.append(run([Segment(kv=trunk, tokens=[1, 2, 3, 4], num_logits=4), Segment(kv=other, tokens=[7])]))
    trunk.truncate(31)
    branches = [trunk.fork(trunk.length - index) for index in range(4)]
    for step in range(2):
        segments = [Segment(kv=kv, tokens=[10 + step + i, 20], num_logits=2) for i, kv in enumerate(branches)]
        outputs.append(run([*segments, Segment(kv=other, tokens=[8 + step])]))
    trunk.publish_prefix(tokens[:30], "tenant")
    trunk.free()
    again = SequenceKV.from_prefix(model.pool, tokens[:30], "tenant")
    assert again.length == 28
    return [*outputs, run([Segment(kv=again, tokens=tokens[28:30], num_logits=2)])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_compute_what_one_does(architecture: str, tmp_path: Path) -> None:
    directory = save(architecture, tmp_path / "model")
    expected = forwards(load_model(directory, **SETTINGS))
    with split(directory) as model:
        assert isinstance(model, DistributedModel)
        assert model._shard.storage.keys.shape[3] == 1, "each rank holds one of the two key/value heads"
        actual: list[torch.Tensor] = []
        # An engine loads on one thread and computes on another.
        thread = threading.Thread(target=lambda: actual.extend(forwards(model)))
        thread.start()
        thread.join()
        used = model.pool.num_used
        with pytest.raises(KVCacheFull):
            model.forward([Segment(kv=SequenceKV(model.pool), tokens=[1] * 250)])
        assert model.pool.num_used == used, "a refused forward changes nothing, and the next one runs"
        actual += forwards(model)
    for one, other in zip(actual, expected * 2, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_killed_follower_is_a_typed_error_at_once(llama: str) -> None:
    with split(llama) as model:
        heard: list[SpecPoolError] = []
        watch_model(model, heard.append)
        kv = SequenceKV(model.pool)
        model.forward([Segment(kv=kv, tokens=[1, 2, 3])])
        os.kill(pid_of(model), signal.SIGKILL)
        began_s = time.monotonic()
        with pytest.raises(FollowerLost, match=r"rank 1 .* was ended by signal 9"):
            model.forward([Segment(kv=kv, tokens=[4])])
        assert time.monotonic() - began_s < 5.0
        assert kv.length == 3
        wait_until(lambda: bool(heard), 1.0)
        assert isinstance(heard[0], FollowerLost)
        with pytest.raises(FollowerLost):
            model.forward([Segment(kv=kv, tokens=[4])])


def test_an_idle_model_tells_of_its_loss_too(llama: str) -> None:
    with split(llama) as model:
        heard: list[SpecPoolError] = []
        watch_model(model, heard.append)
        os.kill(pid_of(model), signal.SIGKILL)
        wait_until(lambda: bool(heard), 5.0)
        late: list[SpecPoolError] = []
        watch_model(model, late.append)
        assert late == heard


def test_a_follower_that_stops_answering_is_lost_at_the_deadline(llama: str) -> None:
    with split(llama, TensorParallelism(size=2, start_timeout_s=60.0, step_timeout_s=2.0)) as model:
        kv = SequenceKV(model.pool)
        model.forward([Segment(kv=kv, tokens=[1, 2, 3])])
        os.kill(pid_of(model), signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(FollowerLost, match="took more than 2 s"):
            model.forward([Segment(kv=kv, tokens=[4])])
        assert 1.5 < time.monotonic() - began_s < 8.0


def test_a_start_that_fails_leaves_nothing_behind(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(children())
    with pytest.raises(FollowerLost, match="rank 1 did not load its part of the model in time"):
        load_model(llama, tensor_parallel=TensorParallelism(size=2, start_timeout_s=0.05), **SETTINGS)
    process = "specpool_engine.modeling.tensor_parallel.follower_process"
    monkeypatch.setattr(f"{process}._FOLLOWER", "specpool.no_such_module")
    with pytest.raises(FollowerLost, match=r"rank 1 .* ended with status 1"):
        load_model(llama, tensor_parallel=PAIR, **SETTINGS)
    assert set(children()) == before
    assert not dist.is_initialized()


def children() -> list[int]:
    text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return [int(pid) for pid in text.split()]


def test_no_follower_outlives_a_killed_leader(llama: str) -> None:
    code = (
        "import sys, time\n"
        "from specpool_engine.modeling.load_model import load_model\n"
        "from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism\n"
        "model = load_model(sys.argv[1], dtype='float32', num_blocks=8, tensor_parallel=TensorParallelism(size=2))\n"
        "print(model._followers[0].process.pid, flush=True)\n"
        "time.sleep(120)\n"
    )
    leader = subprocess.Popen([sys.executable, "-c", code, llama], stdout=subprocess.PIPE, text=True)
    try:
        assert leader.stdout is not None
        follower = int(leader.stdout.readline())
        assert runs(follower)
    finally:
        leader.kill()
        leader.wait()
    wait_until(lambda: not runs(follower), 6.0)


def test_one_process_cannot_hold_two_such_models(llama: str) -> None:
    with split(llama), pytest.raises(InvalidArgument, match="in a process group already"):
        load_model(llama, tensor_parallel=PAIR, **SETTINGS)


def test_heads_that_do_not_divide_are_refused(smollm2_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="llama has 9 attention heads, which 2 does not divide"):
        load_model(str(smollm2_path), tensor_parallel=PAIR, **SETTINGS)


def test_closing_a_model_of_one_process_does_nothing() -> None:
    model = load_model("toy#vocab=8")
    watch_model(model, pytest.fail)  # type: ignore[arg-type]
    close_model(model)
    model.forward([Segment(kv=SequenceKV(model.pool), tokens=[1])])
