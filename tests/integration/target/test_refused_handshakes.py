"""Speculators that do not fit, or do not want: status says why, and requests go on without them."""

from __future__ import annotations

import grpc

PROMPT = (1, 2, 3)


async def test_tokenizer_mismatch_is_reported_and_requests_go_on(target_for, speculator_for):
    target = await target_for()
    speculator = await speculator_for(fingerprint="ab" * 32)
    got = await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint)
    assert len(got.tokens) == 40
    (link,) = (await target.status()).speculators
    assert not link.connected
    assert link.last_error.startswith("target 'toy' has tokenizer ")
    assert "speculator 'fake' has tokenizer abababababab" in link.last_error
    assert speculator.seen["open_sequence"] == 0


async def test_protocol_mismatch_is_reported(target_for, speculator_for):
    target = await target_for()
    speculator = await speculator_for(protocol_version=9)
    await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint)
    (link,) = (await target.status()).speculators
    assert link.last_error == "the target speaks protocol version 1, the speculator 9"


async def test_refused_handshake_is_reported(target_for, speculator_for):
    target = await target_for()
    speculator = await speculator_for(refuse=grpc.StatusCode.FAILED_PRECONDITION)
    await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint)
    (link,) = (await target.status()).speculators
    assert link.last_error == "refused by the script"
