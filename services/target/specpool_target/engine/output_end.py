"""Where an output ends: at a stop token, at a stop string, or at its longest length."""

from __future__ import annotations

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_target.engine.sequence import FinishReason, TargetSequence


def cut_at_end(sequence: TargetSequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
    """End the output at the first stop token, or at the longest length."""
    tokens = tokens[: sequence.max_length - len(sequence.tokens)]
    for index, token in enumerate(tokens):
        if token in sequence.request.stop_token_ids:
            return tokens[: index + 1], FinishReason.STOP
    is_full = len(sequence.tokens) + len(tokens) >= sequence.max_length
    return tokens, FinishReason.LENGTH if is_full else None


def push_text(
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
