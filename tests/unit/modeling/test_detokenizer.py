"""Streamed text: whole characters only, stop strings never leak, the pieces add up to the whole."""

from __future__ import annotations

import pytest

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.text_stream import REPLACEMENT
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint

from .small_tokenizers import byte_level

TOKENIZER = byte_level()
CODEC = TextCodec(TOKENIZER)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_a_character_appears_only_when_it_is_whole() -> None:
    detokenizer = IncrementalDetokenizer(CODEC.decode)
    pieces = [detokenizer.push([token]).text for token in encode("aé€😀")]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]


def test_bytes_that_never_form_a_character_do_not_block_the_stream() -> None:
    continuation = encode("é")[1]
    detokenizer = IncrementalDetokenizer(CODEC.decode)
    text = detokenizer.push([continuation] * 8 + encode("ok")).text
    assert text.endswith("ok")
    assert set(text[:-2]) == {REPLACEMENT}


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    detokenizer = IncrementalDetokenizer(CODEC.decode)
    assert detokenizer.push(encode("€")[:2]).text == ""
    assert detokenizer.finish().text == REPLACEMENT


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_stop_string_across_tokens(chunk: int) -> None:
    tokens = encode("one two\n\nthree")
    detokenizer = IncrementalDetokenizer(CODEC.decode, stop=["\n\n", "zzz"])
    text = ""
    for start in range(0, len(tokens), chunk):
        delta = detokenizer.push(tokens[start : start + chunk])
        text += delta.text
        assert "\n" not in text
        if delta.stopped:
            break
    assert text == "one two"
    assert delta.num_tokens == len("one two\n\n")


def test_text_that_only_begins_like_a_stop_string_is_shown_later() -> None:
    detokenizer = IncrementalDetokenizer(CODEC.decode, stop=["abcd"])
    assert detokenizer.push(encode("xab")).text == "x"
    assert detokenizer.push(encode("c!")).text == "abc!"
    assert detokenizer.push(encode("ab")).text == ""
    assert detokenizer.finish().text == "ab"


def test_the_earliest_stop_string_wins() -> None:
    detokenizer = IncrementalDetokenizer(CODEC.decode, stop=["cd", "bc"])
    delta = detokenizer.push(encode("abcd"))
    assert (delta.text, delta.num_tokens) == ("a", 3)


def test_special_tokens_are_hidden() -> None:
    tokens = [*encode("a"), TOKENIZER.eos_token_id, *encode("b")]
    assert IncrementalDetokenizer(CODEC.decode).push(tokens).text == "ab"


def test_fingerprint_depends_on_vocabulary_and_special_tokens() -> None:
    same = tokenizer_fingerprint(byte_level())
    assert tokenizer_fingerprint(TOKENIZER) == same
    assert tokenizer_fingerprint(byte_level("<stop>")) != same
    assert tokenizer_fingerprint(load_tokenizer("toy#vocab=64")) != tokenizer_fingerprint(
        load_tokenizer("toy#vocab=65")
    )


def test_toy_tokenizer_round_trip() -> None:
    tokenizer = load_tokenizer("toy#vocab=64,seed=1")
    assert tokenizer.decode(tokenizer.encode("hello, world 42\n")) == "hello, world 42\n"
    detokenizer = IncrementalDetokenizer(TextCodec(tokenizer).decode, stop=["lo"])
    assert detokenizer.push(tokenizer.encode("hello")).text == "hel"
