"""Buckets, static tensors, and who gets CUDA graphs; what replays compute is tested with the models."""

from __future__ import annotations

import pytest
import torch

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import get_backend
from specpool_engine.modeling.cuda_graphs import choose_bucket, wants_graphs
from specpool_engine.modeling.static_tensors import StaticTensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_smallest_bucket_that_holds_the_tokens() -> None:
    chosen = [choose_bucket(num_tokens, (4, 8, 32)) for num_tokens in (1, 4, 5, 32, 33)]
    assert chosen == [4, 4, 8, 32, None]


def test_static_tensors_stay_and_get_new_contents() -> None:
    tensors = StaticTensors({"row": (3,), "table": (2, 3), "other": (1,)}, dtype=torch.int32, device=CPU)
    row, table = tensors["row"], tensors["table"]
    tensors.put("row", [1, 2, 3])
    tensors.put_rows("table", [[4], [5, 6]])
    tensors.put("other", [9])
    assert row.tolist() == [0, 0, 0], "nothing arrives before the upload"
    tensors.upload()
    assert row.tolist() == [1, 2, 3]
    assert table.tolist() == [[4, 0, 0], [5, 6, 0]]
    tensors.put("row", [7], padding=8)
    tensors.upload()
    assert row.tolist() == [7, 8, 8]
    assert tensors["row"].data_ptr() == row.data_ptr()
    assert tensors["other"].tolist() == [9]


def test_auto_is_on_where_it_can_be() -> None:
    assert wants_graphs("auto", get_backend("flash"), CUDA)
    assert not wants_graphs("auto", get_backend("flash"), CPU)
    assert not wants_graphs("auto", get_backend("sdpa"), CUDA)
    assert not wants_graphs("off", get_backend("flash"), CUDA)


@pytest.mark.parametrize(
    ("setting", "backend", "device", "message"),
    [
        ("on", "flash", CPU, "needs a CUDA device, and the device is cpu"),
        ("on", "flex", CUDA, "needs attention backend flash, and the backend is flex"),
        ("maybe", "flash", CUDA, "must be one of auto, on, off, got 'maybe'"),
    ],
)
def test_what_cannot_be_had_is_refused(setting: str, backend: str, device: torch.device, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        wants_graphs(setting, get_backend(backend), device)
    assert caught.value.reason == "CUDA_GRAPHS_UNAVAILABLE"
