"""Streamed text: whole characters only, stop strings never leak, the pieces add up to the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specpool_engine.modeling.detokenizer import REPLACEMENT, IncrementalDetokenizer
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint


def byte_level_tokenizer(special: str = "<end>") -> PreTrainedTokenizerFast:
    """Byte-level BPE with no merges: every byte is a token, so characters are split as badly as possible."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special)


TOKENIZER = byte_level_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_a_character_appears_only_when_it_is_whole() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    pieces = [detokenizer.push([token]).text for token in encode("aé€😀")]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀"]


@given(text=st.text(max_size=30), chunk=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_pieces_add_up_to_the_text(text: str, chunk: int) -> None:
    tokens = encode(text)
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    pieces = [detokenizer.push(tokens[i : i + chunk]).text for i in range(0, len(tokens), chunk)]
    pieces.append(detokenizer.finish().text)
    assert "".join(pieces) == detokenizer.text == TOKENIZER.decode(tokens, skip_special_tokens=True)
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_bytes_that_never_form_a_character_do_not_block_the_stream() -> None:
    continuation = encode("é")[1]
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    text = detokenizer.push([continuation] * 8 + encode("ok")).text
    assert text.endswith("ok")
    assert set(text[:-2]) == {REPLACEMENT}


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push(encode("€")[:2]).text == ""
    assert detokenizer.finish().text == REPLACEMENT


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_stop_string_across_tokens(chunk: int) -> None:
    tokens = encode("one two\n\nthree")
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop=["\n\n", "zzz"])
    for start in range(0, len(tokens), chunk):
        delta = detokenizer.push(tokens[start : start + chunk])
        assert "\n" not in detokenizer.text
        if delta.stopped:
            break
    assert detokenizer.text == "one two"
    assert delta.num_tokens == len("one two\n\n")


def test_text_that_only_begins_like_a_stop_string_is_shown_later() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop=["abcd"])
    assert detokenizer.push(encode("xab")).text == "x"
    assert detokenizer.push(encode("c!")).text == "abc!"
    assert detokenizer.push(encode("ab")).text == ""
    assert detokenizer.finish().text == "ab"


def test_the_earliest_stop_string_wins() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop=["cd", "bc"])
    delta = detokenizer.push(encode("abcd"))
    assert (delta.text, delta.num_tokens) == ("a", 3)


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    tokens = [*encode("a"), TOKENIZER.eos_token_id, *encode("b")]
    assert IncrementalDetokenizer(TOKENIZER).push(tokens).text == "ab"
    assert IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False).push(tokens).text == "a<end>b"


def test_fingerprint_depends_on_vocabulary_and_special_tokens() -> None:
    same = tokenizer_fingerprint(byte_level_tokenizer())
    assert tokenizer_fingerprint(TOKENIZER) == same
    assert tokenizer_fingerprint(byte_level_tokenizer("<stop>")) != same
    assert tokenizer_fingerprint(load_tokenizer("toy#vocab=64")) != tokenizer_fingerprint(
        load_tokenizer("toy#vocab=65")
    )


def test_toy_tokenizer_round_trip() -> None:
    tokenizer = load_tokenizer("toy#vocab=64,seed=1")
    assert tokenizer.decode(tokenizer.encode("hello, world 42\n")) == "hello, world 42\n"
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["lo"])
    assert detokenizer.push(tokenizer.encode("hello")).text == "hel"
