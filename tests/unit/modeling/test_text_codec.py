"""Text to tokens and back, by tokenizers of several kinds."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.text_codec import TextCodec

from .small_tokenizers import byte_fallback, byte_level, metaspace

TEXT = "the cat sat , on the mat . 🫨 <end> the"


class SlowTokenizer:
    """A tokenizer that is not written in Rust: only the methods that all of them have."""

    clean_up_tokenization_spaces = True

    def __init__(self) -> None:
        self._fast = byte_level()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._fast.encode(text, add_special_tokens=add_special_tokens)

    def decode(
        self, tokens: list[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        assert isinstance(tokens, list)
        text = self._fast.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text if clean_up_tokenization_spaces is False else text.replace(" ,", ",").replace(" .", ".")

    def get_vocab(self) -> dict[str, int]:
        return self._fast.get_vocab()


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback(), metaspace(TEXT)], ids=["byte", "fallback", "sp"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_tokens_are_those_of_transformers(tokenizer: PreTrainedTokenizerFast, add_special_tokens: bool) -> None:
    expected = tokenizer.encode(TEXT, add_special_tokens=add_special_tokens)
    assert TextCodec(tokenizer).encode(TEXT, add_special_tokens=add_special_tokens) == expected


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_reads_everything() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    assert len(TextCodec(tokenizer).encode("0123456789")) == 10


@pytest.mark.parametrize("tokenizer", [byte_level(), SlowTokenizer()], ids=["Rust", "slow"])
def test_spaces_that_were_shown_stay(tokenizer: PreTrainedTokenizerFast | SlowTokenizer) -> None:
    """The clean-up of `transformers` would take the space before a comma away once the comma is there."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.clean_up_tokenization_spaces = True
    codec = TextCodec(tokenizer)
    detokenizer = IncrementalDetokenizer(codec.decode)
    pieces = [detokenizer.push([token]).text for token in codec.encode("a , b .")]
    assert "".join(pieces) + detokenizer.finish().text == "a , b ."


def test_the_longest_token_bounds_the_text_of_a_context() -> None:
    assert TextCodec(byte_fallback()).max_chars_per_token() == len("<0x00>")
