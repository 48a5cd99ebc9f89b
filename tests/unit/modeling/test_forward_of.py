"""What an engine does meanwhile is done while a device computes, not before it has its work and not after."""

from __future__ import annotations

import pytest
import torch

from specpool.errors import KVCacheFull
from specpool_engine.modeling.interface import forward_of


class Model:
    vocab_size = 8
    max_context = 16
    pool = None
    device = torch.device("cpu")

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def forward(self, segments):
        self.log.append("forward")
        return torch.zeros(len(segments), self.vocab_size)


class Enqueuing(Model):
    """One as on CUDA: `forward` starts the work, and somebody synchronises later."""

    enqueues = True


class Launching(Model):
    def launch(self, segments):
        self.log.append("launch")
        return lambda: self.log.append("wait") or torch.zeros(len(segments), self.vocab_size)


class Full(Enqueuing):
    def forward(self, segments):
        raise KVCacheFull("no room")


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (Model, ["meanwhile", "forward"]),
        (Enqueuing, ["forward", "meanwhile"]),
        (Launching, ["launch", "meanwhile", "wait"]),
    ],
)
def test_order_of_work(kind, order) -> None:
    log: list[str] = []
    logits = forward_of(kind(log))([object()], lambda: log.append("meanwhile"))
    assert logits.shape == (1, 8)
    assert log == order


def test_enqueuing_model_that_computes_on_the_thread_is_like_any_other() -> None:
    log: list[str] = []
    model = Enqueuing(log)
    model.enqueues = False
    forward_of(model)([object()], lambda: log.append("meanwhile"))
    assert log == ["meanwhile", "forward"]


def test_nothing_is_done_meanwhile_if_nothing_was_started() -> None:
    log: list[str] = []
    with pytest.raises(KVCacheFull):
        forward_of(Full(log))([object()], lambda: log.append("meanwhile"))
    assert log == []
