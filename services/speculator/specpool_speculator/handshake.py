"""Hello: whether a target and this speculator fit together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from specpool.errors import ProtocolMismatch, TokenizerMismatch
from specpool.v1 import speculator_pb2, types_pb2
from specpool_engine.distributions.transport import Transport, choose

PROTOCOL_VERSION: Final = 1


def check_hello(
    request: speculator_pb2.SpeculateRequest,
    own: types_pb2.ModelInfo,
    num_tokens: int,
    transports: Iterable[Transport] = (Transport.GRPC,),
) -> Transport:
    """The transport to use; raises the typed error, naming both sides' values, when the stream cannot be accepted.

    Args:
        request: the first message of the stream.
        own: the draft model.
        num_tokens: of the tokenizer; models pad their vocabularies beyond it, and not equally.
        transports: that this speculator has.
    """
    if request.WhichOneof("message") != "hello":
        raise ProtocolMismatch(f"the first message must be hello, got {request.WhichOneof('message')}")
    hello = request.hello
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the target speaks protocol version {hello.protocol_version}, this speculator {PROTOCOL_VERSION}",
            metadata={
                "target_protocol_version": hello.protocol_version,
                "speculator_protocol_version": PROTOCOL_VERSION,
            },
        )
    _check_tokenizer(hello.model, own, num_tokens)
    return choose(hello.transports, transports)


def _check_tokenizer(target: types_pb2.ModelInfo, own: types_pb2.ModelInfo, num_tokens: int) -> None:
    same = target.tokenizer_fingerprint == own.tokenizer_fingerprint
    if same and target.vocab_size >= num_tokens:
        return
    raise TokenizerMismatch(
        f"target {target.name!r} has tokenizer {target.tokenizer_fingerprint[:12]} and {target.vocab_size} tokens, "
        f"speculator {own.name!r} has tokenizer {own.tokenizer_fingerprint[:12]} and {own.vocab_size} tokens",
        metadata={
            "target_tokenizer_fingerprint": target.tokenizer_fingerprint,
            "speculator_tokenizer_fingerprint": own.tokenizer_fingerprint,
            "target_vocab_size": target.vocab_size,
            "speculator_vocab_size": own.vocab_size,
        },
    )


def acknowledge(
    hello: speculator_pb2.Hello,
    peer: types_pb2.Peer,
    own: types_pb2.ModelInfo,
    transport: Transport,
    max_lookahead: int,
    row_budget: int,
) -> speculator_pb2.SpeculateResponse:
    """The answer to a hello that was accepted."""
    return speculator_pb2.SpeculateResponse(
        hello_ack=speculator_pb2.HelloAck(
            protocol_version=PROTOCOL_VERSION,
            speculator=peer,
            model=own,
            transport=transport.value,
            max_lookahead=min(hello.max_lookahead or max_lookahead, max_lookahead),
            row_budget=row_budget,
        )
    )
