"""What a stream has so far, and what of it its client has."""

from __future__ import annotations

from dataclasses import dataclass, field

from specpool.errors import InvalidArgument
from specpool.v1 import inference_pb2
from specpool_router.generation.target_run import Event

Delta = inference_pb2.GenerationDelta


@dataclass(slots=True)
class Progress:
    """The tokens and the text that targets gave: what the next target continues from."""

    token_ids: list[int] = field(default_factory=list)
    num_chars: int = 0
    num_prompt_tokens: int = 0
    is_prompt_counted: bool = False
    """Whether a stream before this one counted the prompt's tokens."""

    def add(self, delta: Delta) -> None:
        """Take in one more delta."""
        self.token_ids.extend(delta.token_ids)
        self.num_chars += len(delta.text)


class Received:
    """Cuts deltas to what a client lacks, exactly, in tokens and in characters."""

    def __init__(self, num_tokens: int, num_chars: int | None) -> None:
        self._num_tokens = num_tokens
        self._num_chars = num_chars

    def rest_of(self, delta: Delta) -> Delta | None:
        """What the client lacks of the next delta; None if nothing."""
        num_tokens, num_text = len(delta.token_ids), len(delta.text)
        num_known = min(self._num_tokens, num_tokens)
        self._num_tokens -= num_known
        num_chars = self._known_chars(num_known, num_tokens, num_text)
        if num_known == 0 and num_chars == 0:
            return delta
        if num_known == num_tokens and num_chars == num_text:
            return None
        return Delta(
            token_ids=delta.token_ids[num_known:], text=delta.text[num_chars:], logprobs=delta.logprobs[num_known:]
        )

    def rest_of_event(self, event: Event) -> Event | None:
        """What the client lacks of the next event; it knows that the request has started."""
        if event.HasField("started"):
            return None
        if not event.HasField("delta"):
            return event
        rest = self.rest_of(event.delta)
        return None if rest is None else Event(delta=rest)

    def _known_chars(self, num_known: int, num_tokens: int, num_text: int) -> int:
        if self._num_chars is not None:
            num_chars = min(self._num_chars, num_text)
            self._num_chars -= num_chars
            return num_chars
        if 0 < num_known < num_tokens:
            raise InvalidArgument(
                "num_tokens_received ends inside a delta, so that the text received must be counted, too",
                metadata={
                    "field": "num_chars_received",
                    "value": "unset",
                    "accepted": "the number of characters received",
                },
            )
        # A delta without tokens belongs to the tokens before it.
        return num_text if num_known or (num_tokens == 0 and self._num_tokens > 0) else 0
