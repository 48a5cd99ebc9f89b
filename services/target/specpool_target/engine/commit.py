"""The end of a round: what of the verified tokens becomes output, and whether the output ends with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specpool.algorithm.verification import VerificationOutcome
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_target.engine.sequence import FinishReason, TargetSequence
from specpool_target.verify.verify_step import TokenLogprobs, logprobs_of


@dataclass(frozen=True, slots=True)
class Committed:
    """What a round brought to one sequence."""

    tokens: list[int]
    text: str | None
    """Text that became final; None where the receiver of the tokens detokenizes."""
    logprobs: list[TokenLogprobs]
    reason: FinishReason | None
    """Why the output ends here; None if it goes on."""


def commit(sequence: TargetSequence, outcome: VerificationOutcome, logits: Tensor, rows: slice) -> Committed:
    """Add the tokens to the sequence, and keep the KV of those accepted. Its `logits` [R, V] are those of `rows`."""
    assert sequence.kv is not None, "it was just computed"
    sequence.kv.truncate(len(sequence.tokens) + outcome.num_accepted)
    tokens, reason = _cut_at_end(sequence, outcome.committed(sequence.draft.tokens))
    text = None
    if sequence.detokenizer is not None:
        tokens, reason, text = _push_text(sequence, sequence.detokenizer, tokens, reason)
    num_top = sequence.request.sampling.num_logprobs
    logprobs = [] if num_top is None else logprobs_of(logits[rows], tokens, num_top)
    sequence.tokens += tokens
    if sequence.round == 0:
        sequence.kv.publish_prefix(sequence.tokens, sequence.salt)
    return Committed(tokens, text, logprobs, reason)


def _cut_at_end(sequence: TargetSequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
    """End the output at the first stop token, or at the longest length."""
    tokens = tokens[: sequence.max_length - len(sequence.tokens)]
    for index, token in enumerate(tokens):
        if token in sequence.request.stop_token_ids:
            return tokens[: index + 1], FinishReason.STOP
    is_full = len(sequence.tokens) + len(tokens) >= sequence.max_length
    return tokens, FinishReason.LENGTH if is_full else None


def _push_text(
    sequence: TargetSequence, detokenizer: IncrementalDetokenizer, tokens: list[int], reason: FinishReason | None
) -> tuple[list[int], FinishReason | None, str]:
    """Detokenize; a stop string that is completed ends the output with the token that completed it."""
    num_before = len(sequence.tokens) - sequence.num_prompt_tokens
    delta = detokenizer.push(tokens)
    text = delta.text
    if not delta.stopped and reason is not None:
        delta = detokenizer.finish()
        text += delta.text
    if delta.num_tokens is not None:
        tokens, reason = tokens[: delta.num_tokens - num_before], FinishReason.STOP
    return tokens, reason, text
