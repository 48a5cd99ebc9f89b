"""From text to tokens and back, whatever kind of tokenizer a model has; safe to call from several threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


class TextCodec:
    """The two directions of a tokenizer.

    The wrapper of `transformers` sets truncation and padding on every `encode`, state that all threads share. The Rust
    tokenizer behind it is therefore called directly: it only reads then, and it releases the interpreter. Tokenizers
    without one are called under a lock.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._rust = getattr(tokenizer, "backend_tokenizer", None)
        if self._rust is not None:  # what a tokenizer's file says of these is for training
            self._rust.no_truncation()
            self._rust.no_padding()
        has_clean_up = hasattr(tokenizer, "clean_up_tokenization_spaces")
        self._options = {"clean_up_tokenization_spaces": False} if has_clean_up else {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, all of them; `add_special_tokens` puts those around it that the model wants."""
        if self._rust is not None:
            return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that the tokens spell, without special tokens and without the clean-up of spaces.

        The clean-up of `transformers` takes spaces away that were there a token ago: no stream could follow it.
        """
        if self._rust is not None:
            return str(self._rust.decode(tokens, skip_special_tokens=True))
        with self._lock:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, **self._options))

    def max_chars_per_token(self) -> int:
        """Number of characters of the longest token: n tokens can stand for at most n times as many."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)
