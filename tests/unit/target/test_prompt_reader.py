"""Prompts: of what cannot fit, no more is tokenized than shows that."""

from __future__ import annotations

import pytest

from specpool.errors import ContextLengthExceeded
from specpool.v1 import inference_pb2
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.toy import ToyTokenizer
from specpool_target.requests.prompt_reader import PromptReader


class CountingCodec(TextCodec):
    """Counts the characters that are tokenized."""

    def __init__(self) -> None:
        super().__init__(ToyTokenizer(64))
        self.num_chars = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_chars += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture
def codec() -> CountingCodec:
    return CountingCodec()


@pytest.fixture
def reader(codec: CountingCodec) -> PromptReader:
    return PromptReader(model_name="toy", vocab_size=64, codec=codec, max_context=100)


def test_only_the_beginning_of_a_text_that_is_much_too_long_is_tokenized(
    reader: PromptReader, codec: CountingCodec
) -> None:
    expected = "the first 800 characters of the prompt, which has 10000, are 800 tokens, the context has 100"
    with pytest.raises(ContextLengthExceeded, match=expected):
        reader.read(inference_pb2.GenerateRequest(text="x" * 10_000))
    assert codec.num_chars == 800


def test_a_chat_that_is_much_too_long_costs_no_more(reader: PromptReader, codec: CountingCodec) -> None:
    message = inference_pb2.ChatMessage(role="user", content="x" * 1000)
    with pytest.raises(ContextLengthExceeded):
        reader.read(inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt(messages=[message] * 20)))
    assert codec.num_chars == 800


def test_a_long_text_of_long_tokens_is_read_whole(reader: PromptReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.codec, "encode", lambda text, **_: [1] * (len(text) // 100))
    assert len(reader.read(inference_pb2.GenerateRequest(text="x" * 9000))) == 90
