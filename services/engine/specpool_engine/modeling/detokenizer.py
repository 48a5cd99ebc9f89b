"""The text of one output as it is shown: whole characters, and nothing that may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpool_engine.modeling.stop_strings import StopStrings
from specpool_engine.modeling.text_stream import Decode, TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDelta:
    """What one call of `IncrementalDetokenizer.push` makes visible."""

    text: str
    """New text, to be appended to what was shown before."""
    num_tokens: int | None = None
    """If a stop string was completed: how many of all tokens pushed so far belong to the output, the one that
    completed the stop string included. None while there is no stop."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing may be pushed afterwards."""
        return self.num_tokens is not None


class IncrementalDetokenizer:
    """Decodes one output token by token. The stop string itself is not part of the text.

    The time per token does not depend on the length of the output; between two calls it keeps a few tokens, and text
    not longer than the longest stop string.
    """

    def __init__(self, decode: Decode, *, prompt_tokens: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Start an output.

        Args:
            decode: text of a list of tokens, see `TextCodec.decode`.
            prompt_tokens: what the output continues.
            stop: strings that end the output.
        """
        self._stream = TextStream(decode, prompt_tokens=prompt_tokens)
        self._stop = StopStrings(stop)
        self._held_text = ""
        self._num_tokens = 0

    def push(self, tokens: Sequence[int]) -> TextDelta:
        """Add committed tokens; returns the text that is now certain."""
        for token in tokens:
            self._num_tokens += 1
            if (stopped := self._add(self._stream.push(token))) is not None:
                return stopped
        return self._show(len(self._held_text) - self._stop.num_held_back)

    def finish(self) -> TextDelta:
        """The rest of the text, when the output ends for another reason than a stop string."""
        stopped = self._add(self._stream.finish())
        return self._show(len(self._held_text)) if stopped is None else stopped

    def _add(self, piece: str) -> TextDelta | None:
        """Hold a piece; if it completes a stop string, everything before that."""
        start = self._stop.push(piece)
        num_held = len(self._held_text)
        self._held_text += piece
        return None if start is None else self._show(num_held + start, self._num_tokens)

    def _show(self, length: int, num_tokens: int | None = None) -> TextDelta:
        text, self._held_text = self._held_text[:length], self._held_text[length:]
        return TextDelta(text=text, num_tokens=num_tokens)
