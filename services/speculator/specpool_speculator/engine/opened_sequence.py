"""What `open_sequence` says, in the engine's terms."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specpool.algorithm.verification import VerificationMode
from specpool.v1 import speculator_pb2, types_pb2
from specpool_engine.runtime.sampling_messages import sampling_from_proto
from specpool_speculator.tree.options import SequenceOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftLimits:
    """What the draft model and the configuration allow a sequence."""

    vocab_size: int
    """Size of the draft model's vocabulary."""
    max_context: int
    """Longest context of the draft model, in tokens."""
    max_lookahead: int
    """Largest lookahead K."""
    end_tokens: frozenset[int]
    """End-of-sequence tokens of the tokenizer."""


def sequence_options(
    message: speculator_pb2.OpenSequence, limits: DraftLimits, target_vocab_size: int
) -> SequenceOptions:
    """Options of a sequence that was checked; raises `InvalidArgument` for sampling parameters that cannot be."""
    sampling = sampling_from_proto(message.sampling)
    vocab_size = min(limits.vocab_size, target_vocab_size)
    sampling.validate(max(limits.vocab_size, target_vocab_size))
    # One model's vocabulary may be padded further than the other's: tokens that only one of them has are never drafted.
    known = {token: bias for token, bias in sampling.logit_bias.items() if token < vocab_size}
    sampling = replace(sampling, logit_bias=known)
    is_rejection = message.verification == types_pb2.VERIFICATION_MODE_REJECTION
    sampled = VerificationMode.REJECTION if is_rejection else VerificationMode.COUPLED
    stops = frozenset(sampling.stop_token_ids)
    return SequenceOptions(
        tenant=message.tenant,
        weight=message.tenant_weight or 1.0,
        sampling=sampling,
        verification=VerificationMode.GREEDY if sampling.is_greedy else sampled,
        seed=sampling.seed or 0,
        num_prompt_tokens=message.num_prompt_tokens,
        lookahead=min(message.max_lookahead or limits.max_lookahead, limits.max_lookahead),
        speculates_ahead=message.mode != types_pb2.SPECULATION_MODE_SD,
        sends_distributions=is_rejection,
        vocab_size=vocab_size,
        stop_tokens=stops if sampling.ignore_eos else stops | limits.end_tokens,
        max_length=min(message.num_prompt_tokens + sampling.max_tokens, limits.max_context),
    )
