"""What a speculator must say before it is used."""

from __future__ import annotations

from typing import Final

from specpool.errors import ProtocolMismatch, TokenizerMismatch
from specpool.v1 import speculator_pb2
from specpool_engine.distributions.transport import labels

PROTOCOL_VERSION: Final = 1


def check_ack(hello: speculator_pb2.Hello, ack: speculator_pb2.HelloAck) -> None:
    """The speculator checks too; but a target must not be made to verify nonsense by one that does not."""
    if ack.protocol_version != hello.protocol_version:
        raise ProtocolMismatch(
            f"target speaks protocol version {hello.protocol_version}, speculator {ack.protocol_version}",
            metadata={"target": hello.protocol_version, "speculator": ack.protocol_version},
        )
    ours, theirs = hello.model.tokenizer_fingerprint, ack.model.tokenizer_fingerprint
    if ours != theirs:
        raise TokenizerMismatch(
            f"target ({hello.model.name}) and speculator ({ack.model.name}) have different tokenizers: "
            f"{ours[:12]} and {theirs[:12]}",
            metadata={"target": ours, "speculator": theirs},
        )
    if ack.transport not in hello.transports:
        raise ProtocolMismatch(
            f"speculator chose the transport {labels([ack.transport])}, which was not offered",
            metadata={"transport": labels([ack.transport])},
        )
