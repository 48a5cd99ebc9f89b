"""From a `RunSequenceRequest` to a checked `SequenceRequest`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from specpool.algorithm.verification import VerificationMode
from specpool.errors import InvalidArgument, ModelNotFound
from specpool.rpc.convert import sampling_from_proto
from specpool.v1 import inference_pb2, target_pb2, types_pb2
from specpool_engine.modeling.text_codec import TextCodec
from specpool_target.engine.sequence import SequenceRequest, SpeculationMode, draw_seed

_MODES: Final = {
    types_pb2.SPECULATION_MODE_UNSPECIFIED: SpeculationMode.SSD,
    types_pb2.SPECULATION_MODE_SSD: SpeculationMode.SSD,
    types_pb2.SPECULATION_MODE_SD: SpeculationMode.SD,
    types_pb2.SPECULATION_MODE_OFF: SpeculationMode.OFF,
}
_VERIFICATIONS: Final = {
    types_pb2.VERIFICATION_MODE_UNSPECIFIED: VerificationMode.COUPLED,
    types_pb2.VERIFICATION_MODE_COUPLED: VerificationMode.COUPLED,
    types_pb2.VERIFICATION_MODE_REJECTION: VerificationMode.REJECTION,
}
_ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class RequestReader:
    """Knows what is served, so that every bad value can be named."""

    model_name: str
    vocab_size: int
    codec: TextCodec
    eos_token_ids: frozenset[int]
    max_lookahead: int

    def read(self, message: target_pb2.RunSequenceRequest, *, traceparent: str = "") -> SequenceRequest:
        """Raises a typed error for the first bad value."""
        request = message.request
        if request.model not in ("", self.model_name):
            raise ModelNotFound(
                f"model {request.model!r} is not served here; served: {self.model_name}",
                metadata={"field": "model", "value": request.model, "accepted": self.model_name},
            )
        sampling = sampling_from_proto(request.sampling)
        sampling.validate(self.vocab_size)
        prompt = self._prompt_tokens(request)
        self._check_tokens("committed_token_ids", message.committed_token_ids)
        if message.committed_token_ids and sampling.seed is None:
            raise _invalid("sampling.seed", "unset", "set when a stream is continued")
        stop_token_ids = frozenset(sampling.stop_token_ids)
        return SequenceRequest(
            # Unique here even if a client uses one id twice.
            id=f"{request.request_id or 'request'}-{uuid.uuid4().hex[:8]}",
            prompt_tokens=prompt,
            committed_tokens=tuple(message.committed_token_ids),
            sampling=sampling if sampling.seed is not None else replace(sampling, seed=draw_seed()),
            mode=_lookup("mode", _MODES, request.mode),
            verification=_lookup("verification", _VERIFICATIONS, request.verification),
            max_lookahead=self._lookahead(request),
            plans_lookahead=not request.HasField("max_lookahead"),
            stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | self.eos_token_ids,
            tenant=message.tenant,
            tenant_weight=message.tenant_weight or 1.0,
            cache_salt=message.cache_salt,
            traceparent=traceparent,
        )

    def _prompt_tokens(self, request: inference_pb2.GenerateRequest) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind == "tokens":
            tokens = list(request.tokens.token_ids)
            self._check_tokens("tokens.token_ids", tokens)
        elif kind == "chat":
            tokens = self._render_chat(request.chat)
        else:
            tokens = list(self.codec.encode(request.text))
        if not tokens:
            raise InvalidArgument(
                "the prompt is empty: give text, chat messages or token ids with at least one token",
                reason="EMPTY_PROMPT",
                metadata={"field": "prompt", "value": "", "accepted": "at least one token"},
            )
        return tokens

    def _render_chat(self, chat: inference_pb2.ChatPrompt) -> list[int]:
        for message in chat.messages:
            if message.role not in _ROLES:
                raise _invalid("chat.messages.role", message.role, " or ".join(_ROLES))
        if not chat.messages:
            return []
        conversation = [{"role": m.role, "content": m.content} for m in chat.messages]
        try:
            text = self.codec.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may refuse a conversation in any way it likes
            raise InvalidArgument(
                f"the chat template of {self.model_name} refused the messages: {error}",
                reason="CHAT_TEMPLATE_REFUSED",
                metadata={"field": "chat"},
            ) from error
        # The template writes the special tokens itself.
        return self.codec.encode(text, add_special_tokens=False)

    def _check_tokens(self, field: str, tokens: Sequence[int]) -> None:
        for token in tokens:
            if token >= self.vocab_size:
                raise _invalid(field, token, f"token ids from 0 to {self.vocab_size - 1}")

    def _lookahead(self, request: inference_pb2.GenerateRequest) -> int:
        if not request.HasField("max_lookahead"):
            return self.max_lookahead
        if request.max_lookahead < 1:
            raise _invalid("max_lookahead", request.max_lookahead, "at least 1")
        return min(request.max_lookahead, self.max_lookahead)


def _lookup(field: str, table: Any, value: int) -> Any:
    if value not in table:
        raise _invalid(field, value, "a value of the protocol")
    return table[value]


def _invalid(field: str, value: object, accepted: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field} must be {accepted}, got {value}",
        metadata={"field": field, "value": value, "accepted": accepted},
    )
