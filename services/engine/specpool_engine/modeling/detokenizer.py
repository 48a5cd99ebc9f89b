"""Streaming text from tokens: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 6
"""A character has at most 4 bytes and so at most 4 byte-level tokens: bytes still invalid then stay invalid."""


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
    """Decodes one output token by token. The stop string itself is not part of the text."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(s for s in stop if s)
        # Tokenizers that mark word beginnings (SentencePiece) strip the space of the first token they decode, so
        # every piece is decoded after some context and the context's own text is cut off.
        self._context = list(prompt_tokens[-_MAX_HELD_TOKENS:])
        self._undecoded: list[int] = []
        self._held_text = ""
        self._num_tokens = 0
        self.text = ""

    def push(self, tokens: Sequence[int]) -> TextDelta:
        """Add committed tokens; returns the text that is now certain."""
        for token in tokens:
            self._num_tokens += 1
            self._held_text += self._decode(token)
            position = self._find_stop()
            if position is not None:
                self._held_text = self._held_text[:position]
                return self._show(len(self._held_text), self._num_tokens)
        return self._show(len(self._held_text) - self._num_held_back())

    def finish(self) -> TextDelta:
        """The rest, when the output ends for another reason than a stop string."""
        if self._undecoded:
            self._held_text += self._piece()
            self._undecoded = []
        position = self._find_stop()
        if position is not None:
            self._held_text = self._held_text[:position]
        return self._show(len(self._held_text), None if position is None else self._num_tokens)

    def _decode(self, token: int) -> str:
        self._undecoded.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._undecoded) < _MAX_HELD_TOKENS:
            return ""  # the rest of a character may follow
        self._context = (self._context + self._undecoded)[-_MAX_HELD_TOKENS:]
        self._undecoded = []
        return piece

    def _piece(self) -> str:
        """Text of the undecoded tokens, given the context."""
        before = self._text_of(self._context)
        after = self._text_of([*self._context, *self._undecoded])
        # A context that begins or ends within a character decodes to replacement characters that may differ between
        # the two; then only the tokens themselves can be trusted.
        return after[len(before) :] if after.startswith(before) else self._text_of(self._undecoded)

    def _text_of(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text

    def _find_stop(self) -> int | None:
        positions = [p for p in map(self._held_text.find, self._stop) if p >= 0]
        return min(positions, default=None)

    def _num_held_back(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held_text)), 0, -1):
            end = self._held_text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0

    def _show(self, length: int, num_tokens: int | None = None) -> TextDelta:
        text, self._held_text = self._held_text[:length], self._held_text[length:]
        self.text += text
        return TextDelta(text=text, num_tokens=num_tokens)
