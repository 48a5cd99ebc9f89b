"""Stop strings: found wherever the text is cut, held back only as long as needed, and cheap however many there are."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.stop_strings import StopStrings

_LETTERS = st.text("ab", max_size=40)


def first_end(text: str, stop: list[str]) -> tuple[int, int] | None:
    """(begin, end) of the stop string that ends first, by trying every place."""
    for end in range(1, len(text) + 1):
        lengths = [len(s) for s in stop if text[:end].endswith(s)]
        if lengths:
            return end - max(lengths), end
    return None


@given(pieces=st.lists(_LETTERS, max_size=8), stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
@settings(max_examples=500, deadline=None)
def test_it_finds_what_trying_every_place_finds(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    before = ""
    for piece in pieces:
        start = stops.push(piece)
        expected = first_end(before + piece, stop)
        assert (None if start is None else len(before) + start) == (expected and expected[0])
        if start is not None:
            return
        before += piece
        beginnings = [n for s in stop for n in range(len(s)) if before.endswith(s[:n])]
        assert stops.num_held_back == max(beginnings, default=0)


@given(pieces=st.lists(_LETTERS, max_size=8), stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
@settings(max_examples=300, deadline=None)
def test_the_shown_text_ends_before_the_stop_string(pieces: list[str], stop: list[str]) -> None:
    """Here a token is a letter."""
    text = "".join(pieces)
    detokenizer = IncrementalDetokenizer(lambda tokens: "".join(map(chr, tokens)), stop=stop)
    shown = ""
    for piece in pieces:
        delta = detokenizer.push([ord(letter) for letter in piece])
        shown += delta.text
        if delta.stopped:
            break
    else:
        shown += detokenizer.finish().text
    found = first_end(text, stop)
    assert shown == (text if found is None else text[: found[0]])


def test_the_most_and_longest_stop_strings_cost_little_per_token() -> None:
    """As many as a request may have, all of which the text begins again and again."""
    stop = ["a" * length + "b" for length in range(480, 512)]
    detokenizer = IncrementalDetokenizer(lambda tokens: "".join(map(chr, tokens)), stop=stop)
    tokens = [ord("a")] * 4000
    started = time.perf_counter()
    for token in tokens:
        detokenizer.push([token])
    us_per_token = (time.perf_counter() - started) / len(tokens) * 1e6
    print(f"{us_per_token:.0f} us per token")
    assert us_per_token < 1000
