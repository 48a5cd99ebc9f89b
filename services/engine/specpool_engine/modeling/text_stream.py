"""Text of tokens as they come: every piece is whole characters, and the pieces add up to the tokenizer's own decoding.

A tokenizer can only be asked for the text of a list of tokens, and what it answers is not the texts of the single ones
put together: characters are split over byte tokens, SentencePiece strips the space of the first token that it decodes,
and the byte-fallback decoder shows *all* bytes of a run as replacement characters while one of them is missing. So each
token is decoded behind the tokens of the piece before it, which begin with a character and end with one.

`tokenizers.decoders.DecodeStream` works alike, but raises when invalid bytes follow valid ones, keeps every token while
none adds to the text (special tokens or invalid bytes for ever: quadratic time), and cannot be asked for the rest at
the end: docs/adr/0014-incremental-text.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING: Final = 8
"""Most tokens that may end inside a character: it has at most 4 bytes, so that after so many they also begin in one."""
_MAX_UNFINISHED: Final = 3
"""Length of the longest beginning of a character, in bytes and so in tokens."""
_MAX_PROMPT_CONTEXT: Final = 16

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one output, piece by piece, in constant time and memory per token."""

    def __init__(self, decode: Decode, *, prompt_tokens: Sequence[int] = ()) -> None:
        """Start behind a prompt.

        Args:
            decode: text of a list of tokens; invalid bytes as U+FFFD.
            prompt_tokens: what the output continues; only the last few are looked at.
        """
        self._decode = decode
        self._context = _context_of(decode, prompt_tokens)
        """Tokens whose text is shown; it begins with a whole character."""
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []
        """Tokens since then; they end inside a character, or this is empty."""
        self._shown = self._context_text
        """What is shown of the text of context and pending tokens."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._pending.append(token)
        text = self._decode([*self._context, *self._pending])
        if not text.endswith(REPLACEMENT):
            return self._finish_piece(text)
        if len(self._pending) > _MAX_PENDING:
            return self._give_up(text)
        certain = text.rstrip(REPLACEMENT)
        if len(certain) <= len(self._shown) or not certain.startswith(self._shown):
            return ""
        piece, self._shown = certain[len(self._shown) :], certain
        return piece

    def finish(self) -> str:
        """What is left when the output ends: an unfinished character is shown as U+FFFD."""
        text, self._pending = self._new_text(self._decode([*self._context, *self._pending])), []
        return text

    def _finish_piece(self, text: str) -> str:
        """Begin a new piece behind text that ends with a whole character."""
        piece = self._new_text(text)
        adds_nothing = text == self._context_text
        if not adds_nothing:
            self._context = self._pending
        elif not self._context_text and len(self._context) < _MAX_PENDING:
            self._context = [*self._context, *self._pending]  # a space that is stripped only where it comes first
        self._pending = []
        if not adds_nothing:
            self._context_text = self._shown = self._decode(self._context)
        return piece

    def _give_up(self, text: str) -> str:
        """Show what cannot become a whole character any more, and go on with the few tokens that still can."""
        if len(self._shown) > len(self._context_text):
            return self._shift(text)
        tokens = self._pending
        num_final = min(range(len(tokens) - _MAX_UNFINISHED, len(tokens)), key=self._num_broken_if_cut)
        self._pending = tokens[:num_final]
        piece = self.finish()
        self._context, self._context_text, self._pending, self._shown = [], "", tokens[num_final:], ""
        return piece

    def _num_broken_if_cut(self, position: int) -> int:
        parts = self._pending[:position], self._pending[position:]
        return sum(self._decode(part).count(REPLACEMENT) for part in parts)

    def _shift(self, text: str) -> str:
        """Keep the last tokens, which begin and end within characters, and the place in their text."""
        self._context, self._context_text, self._pending = [], "", self._pending[-_MAX_UNFINISHED:]
        rest = self._decode(self._pending)
        num_held = min(len(rest), len(text) - len(self._shown))
        piece = text[len(self._shown) : len(text) - num_held]
        self._shown = rest[: len(rest) - num_held]
        return piece

    def _new_text(self, text: str) -> str:
        """The end of `text` that is not shown yet."""
        for shown in (self._shown, self._shown.rstrip(REPLACEMENT)):  # a character that the prompt begins may be whole
            if text.startswith(shown):
                return text[len(shown) :]
        return self._decode(self._pending)  # invalid bytes made the decoder give up the characters before them


def _context_of(decode: Decode, prompt_tokens: Sequence[int]) -> list[int]:
    """The shortest end of the prompt that is visible and begins with a whole character."""
    for length in range(1, min(len(prompt_tokens), _MAX_PROMPT_CONTEXT) + 1):
        text = decode(prompt_tokens[-length:])
        if text and not text.startswith(REPLACEMENT):
            return list(prompt_tokens[-length:])
    return list(prompt_tokens[-_MAX_PROMPT_CONTEXT:])
