"""Checks of what targets say, before anything is done with it. They raise `InvalidArgument`.

A bad value of a message about a sequence ends that sequence here; one of any other message ends the target's stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from specpool.errors import InvalidArgument
from specpool.request_limits import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, check_number, invalid_value
from specpool.rpc.checks import (
    MAX_DRAFT_TOKENS,
    MAX_NAME_CHARS,
    MAX_ROUND,
    MAX_SALT_BYTES,
    check_range,
    check_size,
    check_weight,
)
from specpool.v1 import speculator_pb2, types_pb2

MAX_DEADLINE_MS: Final = 60_000.0
"""Longest deadline of `speculate_now` in milliseconds; a later one is read as this one."""
_MAX_TRACEPARENT_CHARS: Final = 256
_MAX_TRANSPORTS: Final = 16
_MAX_KEY_BYTES: Final = 65_536


def check_hello(message: speculator_pb2.Hello) -> None:
    """Check what is shown of a target: it has to be bounded."""
    texts = {
        "target.id": message.target.id,
        "target.endpoint": message.target.endpoint,
        "model.name": message.model.name,
        "model.tokenizer_fingerprint": message.model.tokenizer_fingerprint,
    }
    for field, text in texts.items():
        check_size(field, len(text), MAX_NAME_CHARS)
    check_size("transports", len(message.transports), _MAX_TRANSPORTS)


def check_open(message: speculator_pb2.OpenSequence, *, vocab_size: int, max_context: int) -> None:
    """Check all but the sampling parameters, which check themselves."""
    check_size("tenant", len(message.tenant), MAX_NAME_CHARS)
    check_size("cache_salt", len(message.cache_salt), MAX_SALT_BYTES)
    check_size("traceparent", len(message.traceparent), _MAX_TRACEPARENT_CHARS)
    check_number("sampling.stop_token_ids", message.sampling.stop_token_ids, MAX_STOP_TOKEN_IDS)
    check_number("sampling.logit_bias", message.sampling.logit_bias, MAX_LOGIT_BIASES)
    check_weight(message.tenant_weight)
    if not 1 <= (num_tokens := len(message.token_ids)) <= max_context:
        raise invalid_value("token_ids", f"{num_tokens} tokens", f"1 to {max_context} tokens")
    check_range("num_prompt_tokens", message.num_prompt_tokens, 0, num_tokens)
    if message.verification not in types_pb2.VerificationMode.values():
        raise invalid_value("verification", message.verification, "a value of the protocol")
    if message.mode not in types_pb2.SpeculationMode.values():
        raise invalid_value("mode", message.mode, "a value of the protocol")
    check_tokens("token_ids", message.token_ids, vocab_size)
    check_draft(message.round, message.draft_tokens, vocab_size)


def check_outcome(message: speculator_pb2.Outcome, vocab_size: int) -> None:
    """Check all but the number of accepted tokens, which has to fit the round."""
    check_tokens("bonus_token", (message.bonus_token,), vocab_size)
    check_draft(message.round, message.draft_tokens, vocab_size)


def check_draft(round_: int, draft_tokens: Sequence[int], vocab_size: int) -> None:
    """Check the round and the draft tokens that it verifies."""
    check_range("round", round_, 0, MAX_ROUND)
    check_size("draft_tokens", len(draft_tokens), MAX_DRAFT_TOKENS)
    check_tokens("draft_tokens", draft_tokens, vocab_size)


def check_speculate_now(message: speculator_pb2.SpeculateNow) -> None:
    """Check the round and the deadline. The number of tokens is whatever the target likes: it gets what there is."""
    check_range("round", message.round, 0, MAX_ROUND)
    check_range("deadline_ms", message.deadline_ms, 0, float("inf"))


def check_tokens(field: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens that the draft model does not have: nothing can be drafted after them."""
    if tokens and (largest := max(tokens)) >= vocab_size:
        raise InvalidArgument(
            f"{field} has token {largest}, beyond the draft's vocabulary of {vocab_size}",
            metadata={"field": field, "value": largest, "accepted": f"0 to {vocab_size - 1}"},
        )


def check_ids(request: speculator_pb2.SpeculateRequest) -> None:
    """Check what is kept of a message before anything else is known of it: ids, and keys until their group is built."""
    kind = request.WhichOneof("message")
    if kind == "outcomes":
        longest = max((len(outcome.sequence_id) for outcome in request.outcomes.outcomes), default=0)
        check_size("outcomes.sequence_id", longest, MAX_NAME_CHARS)
    elif kind == "group_key":
        check_size("group_key.key", len(request.group_key.key), MAX_NAME_CHARS)
        check_size("group_key.value", len(request.group_key.value), _MAX_KEY_BYTES)
    elif kind is not None and kind != "open_group":
        check_size(f"{kind}.sequence_id", len(getattr(request, kind).sequence_id), MAX_NAME_CHARS)
