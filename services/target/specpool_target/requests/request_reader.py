"""From a `RunSequenceRequest` to a checked `SequenceRequest`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any, Final

from specpool.algorithm.verification import VerificationMode
from specpool.errors import ContextLengthExceeded, ModelNotFound
from specpool.request_limits import (
    MAX_TENANT_NAME_CHARS,
    check_prompt_size,
    check_request,
    check_text,
    invalid_value,
)
from specpool.rpc.checks import MAX_SALT_BYTES, check_size, check_weight
from specpool.v1 import inference_pb2, target_pb2, types_pb2
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.runtime.sampling_messages import sampling_from_proto
from specpool_target.engine.sequence import SequenceRequest, SpeculationMode, draw_seed
from specpool_target.requests.prompt_reader import PromptReader

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


@dataclass(frozen=True, kw_only=True)
class RequestReader:
    """Reads and checks requests; knows what is served, so that every bad value can be named."""

    model: types_pb2.ModelInfo
    codec: TextCodec
    eos_token_ids: frozenset[int]
    max_lookahead: int

    def check_sizes(self, message: target_pb2.RunSequenceRequest) -> None:
        """Refuse lists and texts that are too long, before anything of them is converted. Raises InvalidArgument."""
        check_request(message.request)
        check_prompt_size(
            message.request, max_context=self.model.max_context, max_prompt_chars=self.model.max_prompt_chars
        )
        self._check_envelope(message)

    def read(self, message: target_pb2.RunSequenceRequest, *, traceparent: str = "") -> SequenceRequest:
        """The request of a message whose sizes were checked; takes up to seconds for a long prompt.

        Raises InvalidArgument or ModelNotFound for the first bad value.
        """
        request = message.request
        if request.model not in ("", self.model.name):
            raise ModelNotFound(
                f"model {request.model!r} is not served here; served: {self.model.name}",
                metadata={"field": "model", "value": request.model, "accepted": self.model.name},
            )
        sampling = sampling_from_proto(request.sampling)
        sampling.validate(self.model.vocab_size)
        mode = _lookup("mode", _MODES, request.mode)
        verification = _lookup("verification", _VERIFICATIONS, request.verification)
        lookahead = self._lookahead(request)
        if message.committed_token_ids and sampling.seed is None:
            raise invalid_value("sampling.seed", "unset", "set when a stream is continued")
        prompts = self._prompts()
        prompts.check_tokens("committed_token_ids", message.committed_token_ids)
        stop_token_ids = frozenset(sampling.stop_token_ids)
        return SequenceRequest(
            # Unique here even if a client uses one id twice.
            id=f"{request.request_id or 'request'}-{uuid.uuid4().hex[:8]}",
            prompt_tokens=prompts.read(request),
            committed_tokens=tuple(message.committed_token_ids),
            was_running=message.was_running,
            sampling=sampling if sampling.seed is not None else replace(sampling, seed=draw_seed()),
            mode=mode,
            verification=verification,
            max_lookahead=lookahead,
            leaves_lookahead=not request.HasField("max_lookahead"),
            stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | self.eos_token_ids,
            tenant=message.tenant,
            tenant_weight=message.tenant_weight or 1.0,
            cache_salt=message.cache_salt,
            traceparent=traceparent,
        )

    def _check_envelope(self, message: target_pb2.RunSequenceRequest) -> None:
        """Check what the router adds to the client's request."""
        check_text("tenant", message.tenant, MAX_TENANT_NAME_CHARS)
        check_size("cache_salt", len(message.cache_salt), MAX_SALT_BYTES)
        check_weight(message.tenant_weight)
        num_committed, max_context = len(message.committed_token_ids), self.model.max_context
        if num_committed > max_context:
            raise ContextLengthExceeded(
                f"committed_token_ids must be at most {max_context} tokens, the context of the model, "
                f"got {num_committed}",
                metadata={
                    "field": "committed_token_ids",
                    "value": num_committed,
                    "accepted": f"at most {max_context}",
                },
            )

    def _prompts(self) -> PromptReader:
        return PromptReader(
            model_name=self.model.name,
            vocab_size=self.model.vocab_size,
            codec=self.codec,
            max_context=self.model.max_context,
        )

    def _lookahead(self, request: inference_pb2.GenerateRequest) -> int:
        if not request.HasField("max_lookahead"):
            return self.max_lookahead
        if request.max_lookahead < 1:
            raise invalid_value("max_lookahead", request.max_lookahead, "at least 1")
        return min(request.max_lookahead, self.max_lookahead)


def _lookup(field: str, table: Any, value: int) -> Any:
    if value not in table:
        raise invalid_value(field, value, "a value of the protocol")
    return table[value]
