"""What is offered, and that asking for what is not there is an error."""

from __future__ import annotations

import pytest
import torch

from specpool.errors import ConfigError, TransportUnavailable
from specpool.speculation.handshake import transport_labels
from specpool_engine.distributions.transport import Transport, choose, offered


def test_auto_offers_what_there_is() -> None:
    assert offered("auto", "cpu") == (Transport.GLOO, Transport.GRPC)
    assert offered("grpc", "cpu") == (Transport.GRPC,)
    assert offered("gloo", "cpu") == (Transport.GLOO,)


def test_nccl_without_cuda_is_an_error() -> None:
    with pytest.raises(TransportUnavailable, match="GPUs only"):
        offered("nccl", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_nccl_on_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TransportUnavailable, match="no CUDA device"):
        offered("nccl", "cuda")


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        offered("mpi", "cpu")
    assert caught.value.metadata["accepted"] == "auto, grpc, gloo, nccl"


def test_labels_name_unknown_transports_too() -> None:
    assert transport_labels([1, 3, 9]) == "grpc, nccl, 9"


def test_the_targets_preference_decides() -> None:
    assert choose([3, 2, 1], offered("auto", "cpu")) is Transport.GLOO
    assert choose([], offered("auto", "cpu")) is Transport.GRPC
    with pytest.raises(TransportUnavailable) as caught:
        choose([1], offered("gloo", "cpu"))
    assert caught.value.metadata == {"target_transports": "grpc", "speculator_transports": "gloo"}
