"""One span per sequence, in the trace of its request, with its rounds as events."""

from __future__ import annotations

import time
from dataclasses import dataclass

from opentelemetry.trace import Span

from specpool.telemetry import tracing
from specpool_speculator.tree.options import SequenceOptions
from specpool_speculator.tree.sequence import SequenceKey, SequenceState


@dataclass(slots=True)
class _Open:
    span: Span
    events: tracing.RoundEvents
    round_started_s: float


class SequenceSpans:
    """Trace spans of the sequences held; untraced requests have none."""

    def __init__(self) -> None:
        self._open: dict[SequenceKey, _Open] = {}

    def open(self, key: SequenceKey, traceparent: str, options: SequenceOptions) -> None:
        """Begin the span of a sequence that was opened."""
        if not traceparent:
            return
        attributes = {
            tracing.SEQUENCE: key[1],
            tracing.TENANT: options.tenant,
            tracing.VERIFICATION_MODE: options.verification.value,
            tracing.SPECULATION_MODE: "ssd" if options.speculates_ahead else "sd",
        }
        span = tracing.tracer().start_span(
            "specpool.speculate sequence", context=tracing.context_of(traceparent), attributes=attributes
        )
        self._open[key] = _Open(span, tracing.RoundEvents(span), time.monotonic())

    def round(self, sequence: SequenceState, *, num_accepted: int, num_drafted: int | None) -> None:
        """Record a round's outcome; `num_drafted` tokens were pushed for it, None if it was not guessed."""
        entry = self._open.get(sequence.key)
        if entry is None:
            return
        now_s = time.monotonic()
        entry.events.add(
            num_draft_tokens=len(sequence.tree.path) - 1,
            num_accepted=num_accepted,
            outcome=_lookup_name(sequence, num_drafted),
            duration_s=now_s - entry.round_started_s,
        )
        entry.round_started_s = now_s

    def close(self, key: SequenceKey) -> None:
        """End the span of a sequence that was closed."""
        entry = self._open.pop(key, None)
        if entry is not None:
            entry.events.finish()
            entry.span.end()


def _lookup_name(sequence: SequenceState, num_drafted: int | None) -> str:
    if not sequence.options.speculates_ahead:
        return "none"
    if num_drafted is None:
        return "miss"
    if num_drafted == 0:
        return "late"
    return "hit" if num_drafted >= sequence.options.lookahead else "partial"
