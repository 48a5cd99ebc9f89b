"""Text of tokens that come one by one: the pieces add up to the tokenizer's own decoding, at a constant cost."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.text_stream import REPLACEMENT, TextStream

from .small_tokenizers import byte_fallback, byte_level, byte_level_merged, metaspace

EXAMPLES = [
    "Repeat: 🫨🫨🫨🫨",
    "𓀀𓀁𓀂𓀃𓀄",
    "𠀀𠀁𠀂𠀃 𠮷野家",
    "𝒜𝓁𝓅𝒽𝒶 𝔸𝔹",
    "the cat 🫨 sat  on é你好你好 mat",
    " hello   world ",
    "👩‍👩‍👧‍👦 e\u0301 \u202e",
]
CODECS = {
    "byte level": TextCodec(byte_level()),
    "byte level, merged": TextCodec(byte_level_merged()),
    "byte fallback": TextCodec(byte_fallback()),
    "byte fallback, Gemma": TextCodec(byte_fallback(strips_first_space=False)),
    "metaspace": TextCodec(metaspace("".join(EXAMPLES))),
}
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
ALPHABET = st.sampled_from("the catson🫨𓀀𓀁𠀀𠮷𝒜é€你好\u0301\u200d\ufffd ") | st.characters(exclude_categories=["Cs"])
TEXTS = st.sampled_from(EXAMPLES) | st.text(ALPHABET, max_size=25)


def stream(codec: TextCodec, tokens: list[int], cuts: list[int], prompt: list[int]) -> list[str]:
    """The pieces of `tokens`, given in deltas that end at `cuts`."""
    detokenizer = IncrementalDetokenizer(codec.decode, prompt_tokens=prompt)
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    pieces = [detokenizer.push(tokens[start:end]).text for start, end in pairwise(bounds)]
    return [*pieces, detokenizer.finish().text]


@codecs
@given(text=TEXTS, cuts=st.lists(st.integers(0, 100), max_size=20))
@settings(max_examples=200, deadline=None)
def test_the_pieces_of_every_split_are_the_tokenizers_own_text(codec: TextCodec, text: str, cuts: list[int]) -> None:
    tokens = codec.encode(text, add_special_tokens=False)
    pieces = stream(codec, tokens, cuts, prompt=[])
    assert "".join(pieces) == codec.decode(tokens)
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(pieces)


@codecs
@given(prompt=TEXTS.filter(bool), text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_the_pieces_behind_a_prompt_are_what_the_whole_text_adds_to_it(
    codec: TextCodec, prompt: str, text: str
) -> None:
    before = codec.encode(prompt, add_special_tokens=False)
    tokens = codec.encode(text, add_special_tokens=False)
    whole = codec.decode([*before, *tokens])
    assert "".join(stream(codec, tokens, list(range(100)), before)) == whole.removeprefix(codec.decode(before))


@codecs
@pytest.mark.parametrize("text", EXAMPLES)
def test_a_character_is_shown_with_its_last_token(codec: TextCodec, text: str) -> None:
    """No piece is late: what is shown after each token is what the tokens so far spell, up to a broken end."""
    tokens = codec.encode(text, add_special_tokens=False)
    texts = TextStream(codec.decode)
    shown = ""
    for number, token in enumerate(tokens, start=1):
        shown += texts.push(token)
        so_far = codec.decode(tokens[:number])
        assert so_far.endswith(REPLACEMENT) or shown == so_far
    assert shown == so_far


@codecs
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_text_and_what_is_valid_survives(codec: TextCodec, data: st.DataObject) -> None:
    vocab_size = len(codec.tokenizer)
    noise = data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=40))
    tokens = noise + codec.encode(" the cat", add_special_tokens=False)
    text = "".join(stream(codec, tokens, list(range(100)), prompt=[]))
    assert text.endswith("the cat")


@pytest.mark.parametrize("codec", [CODECS["byte level"], CODECS["byte fallback"]])
def test_a_character_after_many_broken_bytes_is_whole(codec: TextCodec) -> None:
    broken = codec.encode("🫨", add_special_tokens=False)[-1]
    for number in range(1, 30):
        tokens = [broken] * number + codec.encode("x🫨🫨", add_special_tokens=False)
        text = "".join(stream(codec, tokens, list(range(100)), prompt=[]))
        assert text.lstrip(REPLACEMENT).strip() == "x🫨🫨"


@codecs
def test_special_tokens_do_not_swallow_the_space_after_them(codec: TextCodec) -> None:
    end = codec.tokenizer.eos_token_id
    the, cat = (codec.encode(text, add_special_tokens=False) for text in ("the", "the cat"))
    tokens = [*the, *[end] * 50, *cat[len(the) :]]
    assert "".join(stream(codec, tokens, [], prompt=[])) == codec.decode(tokens) == "the cat"


class CountingDecode:
    """Counts what the stream asks of a tokenizer."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.num_tokens = 0

    def __call__(self, tokens: list[int]) -> str:
        self.num_tokens += len(tokens)
        return self.codec.decode(tokens)


def _long_outputs(codec: TextCodec) -> dict[str, list[int]]:
    broken = codec.encode("🫨", add_special_tokens=False)[-1:]
    texts = {
        name: codec.encode(text, add_special_tokens=False)
        for name, text in {"words": "the cat sat on ", "bytes": "𠀀𠀁𠀂", "across": "你好"}.items()
    }
    return texts | {"special": [codec.tokenizer.eos_token_id], "broken": broken}


@codecs
@pytest.mark.parametrize("kind", ["words", "bytes", "across", "special", "broken"])
def test_the_cost_of_a_token_does_not_grow(codec: TextCodec, kind: str) -> None:
    unit = _long_outputs(codec)[kind]
    tokens = (unit * (10_000 // len(unit) + 1))[:10_000]
    decode = CountingDecode(codec)
    texts = TextStream(decode)
    started = time.perf_counter()
    num_decoded = []
    for token in tokens:
        decode.num_tokens = 0
        texts.push(token)
        num_decoded.append(decode.num_tokens)
    print(f"{(time.perf_counter() - started) / len(tokens) * 1e6:.1f} us per token")
    assert max(num_decoded) <= 150
    assert sum(num_decoded) / len(tokens) <= 30
