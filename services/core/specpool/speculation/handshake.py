"""Hello: whether a target and a speculator fit together. Each side checks, so that neither has to trust the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from specpool.errors import ProtocolMismatch, TokenizerMismatch
from specpool.v1 import speculator_pb2, types_pb2

PROTOCOL_VERSION: Final = 1
"""Version of the protocol that this package speaks; there is no other place for it."""
_LABELS: Final[Mapping[int, str]] = {
    value: name.removeprefix("DISTRIBUTION_TRANSPORT_").lower()
    for name, value in speculator_pb2.DistributionTransport.items()
}


def check_hello(hello: speculator_pb2.Hello, own: types_pb2.ModelInfo, num_tokens: int) -> None:
    """Check a target's hello at the speculator. Raises the typed error that names both sides' values.

    Args:
        hello: of the target.
        own: the draft model.
        num_tokens: of the tokenizer; models pad their vocabularies beyond it, and not equally.
    """
    _check_versions(target=hello.protocol_version, speculator=PROTOCOL_VERSION)
    _check_tokenizers(hello.model, own, num_tokens)


def check_ack(hello: speculator_pb2.Hello, ack: speculator_pb2.HelloAck) -> None:
    """Check a speculator's answer at the target, which must not be made to verify nonsense."""
    _check_versions(target=hello.protocol_version, speculator=ack.protocol_version)
    _check_tokenizers(hello.model, ack.model)
    if ack.transport not in hello.transports:
        name = transport_labels([ack.transport])
        raise ProtocolMismatch(
            f"speculator chose the transport {name}, which was not offered", metadata={"transport": name}
        )


def acknowledge(
    hello: speculator_pb2.Hello,
    *,
    peer: types_pb2.Peer,
    own: types_pb2.ModelInfo,
    transport: speculator_pb2.DistributionTransport.ValueType,
    max_lookahead: int,
    row_budget: int,
    max_sequences: int,
    load: types_pb2.Load,
) -> speculator_pb2.SpeculateResponse:
    """The speculator's answer to a hello that was accepted."""
    return speculator_pb2.SpeculateResponse(
        hello_ack=speculator_pb2.HelloAck(
            protocol_version=PROTOCOL_VERSION,
            speculator=peer,
            model=own,
            transport=transport,
            max_lookahead=min(hello.max_lookahead or max_lookahead, max_lookahead),
            row_budget=row_budget,
            max_sequences=max_sequences,
            load=load,
        )
    )


def transport_labels(transports: Iterable[int]) -> str:
    """Names of transports for messages: grpc, gloo, nccl, or the number of one that is not known."""
    return ", ".join(_LABELS.get(transport, str(transport)) for transport in transports)


def _check_versions(*, target: int, speculator: int) -> None:
    if target != speculator:
        raise ProtocolMismatch(
            f"the target speaks protocol version {target}, the speculator {speculator}",
            metadata={"target_protocol_version": target, "speculator_protocol_version": speculator},
        )


def _check_tokenizers(target: types_pb2.ModelInfo, speculator: types_pb2.ModelInfo, num_tokens: int = 0) -> None:
    if target.tokenizer_fingerprint == speculator.tokenizer_fingerprint and target.vocab_size >= num_tokens:
        return
    raise TokenizerMismatch(
        f"target {target.name!r} has tokenizer {target.tokenizer_fingerprint[:12]} and {target.vocab_size} tokens, "
        f"speculator {speculator.name!r} has tokenizer {speculator.tokenizer_fingerprint[:12]} and "
        f"{speculator.vocab_size} tokens",
        metadata={
            "target_tokenizer_fingerprint": target.tokenizer_fingerprint,
            "speculator_tokenizer_fingerprint": speculator.tokenizer_fingerprint,
            "target_vocab_size": target.vocab_size,
            "speculator_vocab_size": speculator.vocab_size,
        },
    )
