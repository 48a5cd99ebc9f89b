"""What status says of CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specpool_engine.modeling.cuda_graphs import describe_graphs


@pytest.mark.parametrize(
    ("setting", "device", "has_static_attention", "graphs", "expected"),
    [
        ("auto", "cuda:0", True, object(), "on, for forwards of up to 256 tokens"),
        ("off", "cuda:0", True, None, "off, as cuda_graphs says"),
        ("auto", "cpu", False, None, "off, since the device is cpu"),
        ("auto", "cuda:0", False, None, "off, since the attention backend is flex"),
        ("auto", "cuda:0", True, None, "off, since this model is not computed by kernels of this process alone"),
    ],
)
def test_it_says_why(setting: str, device: str, has_static_attention: bool, graphs: object, expected: str) -> None:
    model: Any = SimpleNamespace(device=torch.device(device), graphs=graphs)
    backend: Any = SimpleNamespace(name="flex", has_static_attention=has_static_attention)
    assert describe_graphs(setting, model, backend) == expected
