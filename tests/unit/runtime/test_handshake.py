"""Hello and its answer: both sides check the same things."""

from __future__ import annotations

import pytest

from specpool.errors import ProtocolMismatch, SpecPoolError, TokenizerMismatch
from specpool.speculation.handshake import PROTOCOL_VERSION, acknowledge, check_ack, check_hello
from specpool.v1 import speculator_pb2, types_pb2

OWN = types_pb2.ModelInfo(name="draft", tokenizer_fingerprint="a" * 64, vocab_size=100)
GRPC, NCCL = speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC, speculator_pb2.DISTRIBUTION_TRANSPORT_NCCL


def hello_of(version=PROTOCOL_VERSION, fingerprint="a" * 64, vocab_size=100):
    model = types_pb2.ModelInfo(name="big", tokenizer_fingerprint=fingerprint, vocab_size=vocab_size)
    return speculator_pb2.Hello(protocol_version=version, model=model, transports=[GRPC], max_lookahead=4)


def answer(hello, transport=GRPC):
    peer = types_pb2.Peer(id="s")
    limits = {"max_lookahead": 8, "row_budget": 1, "max_sequences": 2, "load": types_pb2.Load()}
    return acknowledge(hello, peer=peer, own=OWN, transport=transport, **limits).hello_ack


def test_what_fits_is_accepted_by_both():
    hello = hello_of()
    check_hello(hello, OWN, num_tokens=90)
    ack = answer(hello)
    check_ack(hello, ack)
    assert ack.max_lookahead == 4


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (hello_of(version=PROTOCOL_VERSION + 1), ProtocolMismatch),
        (hello_of(fingerprint="b" * 64), TokenizerMismatch),
        (hello_of(vocab_size=80), TokenizerMismatch),
    ],
)
def test_the_speculator_refuses(hello: speculator_pb2.Hello, error: type[SpecPoolError]):
    with pytest.raises(error):
        check_hello(hello, OWN, num_tokens=90)


def test_the_target_refuses_a_transport_that_it_did_not_offer():
    hello = hello_of()
    with pytest.raises(ProtocolMismatch, match="nccl"):
        check_ack(hello, answer(hello, transport=NCCL))
    with pytest.raises(TokenizerMismatch):
        check_ack(hello_of(fingerprint="b" * 64), answer(hello))
