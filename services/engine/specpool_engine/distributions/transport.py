"""Which transports of draft distributions a process has, and which it is told to use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, get_args

import torch
import torch.distributed

from specpool.errors import TransportUnavailable
from specpool.speculation.handshake import transport_labels
from specpool.v1 import speculator_pb2
from specpool_engine.distributions.choices import BodyType, check_transport_choice

BODY_TYPES: Final[Mapping[str, torch.dtype]] = {name: getattr(torch, name) for name in get_args(BodyType)}
"""Types in which dense rows may travel."""


class Transport(IntEnum):
    """How draft distributions travel; the numbers are the protocol's."""

    GRPC = speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC
    """Sparse, inside the stream."""
    GLOO = speculator_pb2.DISTRIBUTION_TRANSPORT_GLOO
    """Dense, over a process group, from host memory."""
    NCCL = speculator_pb2.DISTRIBUTION_TRANSPORT_NCCL
    """Dense, over a process group, from GPU to GPU."""

    @property
    def label(self) -> str:
        """Name of the transport in settings, status and metrics: grpc, gloo or nccl."""
        return self.name.lower()

    @property
    def is_dense(self) -> bool:
        """Whether whole distributions travel, over a process group, rather than sparse ones in the stream."""
        return self is not Transport.GRPC


def offered(choice: str, device: str) -> tuple[Transport, ...]:
    """What a process with this setting and device offers, in order of preference.

    `auto` is everything there is. A transport asked for by name is offered alone, so that its absence on the other side
    is an error there, and its absence here is one now: `TransportUnavailable`.
    """
    check_transport_choice(choice)
    if choice == "auto":
        return tuple(t for t in (Transport.NCCL, Transport.GLOO, Transport.GRPC) if missing_for(t, device) is None)
    transport = Transport[choice.upper()]
    missing = missing_for(transport, device)
    if missing is not None:
        raise TransportUnavailable(
            f"distribution_transport is {choice}, but {missing}",
            metadata={"field": "distribution_transport", "value": choice, "device": device},
        )
    return (transport,)


def missing_for(transport: Transport, device: str) -> str | None:
    """Why `transport` cannot be had here, as part of a sentence; None if it can."""
    if not transport.is_dense:
        return None
    if not torch.distributed.is_available():
        return "this torch is built without torch.distributed"
    if transport is Transport.GLOO:
        return None if torch.distributed.is_gloo_available() else "this torch is built without gloo"
    if torch.device(device).type != "cuda":
        return f"the model is on {device}: nccl moves tensors between GPUs only"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None if torch.distributed.is_nccl_available() else "this torch is built without nccl"


def choose(theirs: Iterable[int], ours: Iterable[Transport]) -> Transport:
    """The first of `theirs`, in their order of preference, that is among `ours`; raises `TransportUnavailable`.

    A peer that names none is one that knows of sparse distributions only.
    """
    wanted = list(theirs) or [int(Transport.GRPC)]
    own = list(ours)
    for transport in wanted:
        if transport in own:
            return Transport(transport)
    raise TransportUnavailable(
        f"the target offers {transport_labels(wanted)}, this speculator {transport_labels(own)}",
        metadata={"target_transports": transport_labels(wanted), "speculator_transports": transport_labels(own)},
    )
