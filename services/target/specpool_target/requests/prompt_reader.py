"""From the prompt of a request to tokens: text, chat messages or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from specpool.errors import ContextLengthExceeded, InvalidArgument
from specpool.request_limits import invalid_value
from specpool.v1 import inference_pb2
from specpool_engine.modeling.text_codec import TextCodec

_ROLES: Final = ("system", "user", "assistant")
_TRIAL_CHARS_PER_TOKEN: Final = 8
_TRIAL_GROWTH: Final = 4
_TRIAL_SLACK: Final = 64
"""Most tokens that the end of a text that was cut may add."""
_MAX_REFUSAL_CHARS: Final = 300


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Reads prompts; knows the tokenizer and the context, so that a prompt that does not fit costs little."""

    model_name: str
    vocab_size: int
    codec: TextCodec
    max_context: int
    """Length of the longest sequence in tokens."""

    def read(self, request: inference_pb2.GenerateRequest) -> Sequence[int]:
        """The prompt's tokens, at least one. Raises InvalidArgument."""
        kind = request.WhichOneof("prompt")
        if kind == "tokens":
            tokens = list(request.tokens.token_ids)
            self.check_tokens("tokens.token_ids", tokens)
        elif kind == "chat":
            tokens = self._render_chat(request.chat)
        else:
            tokens = self._encode(request.text)
        if not tokens:
            raise InvalidArgument(
                "the prompt is empty: give text, chat messages or token ids with at least one token",
                reason="EMPTY_PROMPT",
                metadata={"field": "prompt", "value": "", "accepted": "at least one token"},
            )
        return tokens

    def check_tokens(self, field: str, tokens: Sequence[int]) -> None:
        """Refuse token ids that the model does not have."""
        largest = max(tokens, default=0)
        if largest >= self.vocab_size:
            raise invalid_value(field, largest, f"token ids from 0 to {self.vocab_size - 1}")

    def _render_chat(self, chat: inference_pb2.ChatPrompt) -> list[int]:
        for message in chat.messages:
            if message.role not in _ROLES:
                raise invalid_value("chat.messages.role", message.role, " or ".join(_ROLES))
        if not chat.messages:
            return []
        conversation = [{"role": m.role, "content": m.content} for m in chat.messages]
        try:
            text = self.codec.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may refuse a conversation in any way it likes
            raise InvalidArgument(
                f"the chat template of {self.model_name} refused the messages: {str(error)[:_MAX_REFUSAL_CHARS]}",
                reason="CHAT_TEMPLATE_REFUSED",
                metadata={"field": "chat", "value": f"{len(conversation)} messages", "accepted": "what it renders"},
            ) from error
        return self._encode(text, add_special_tokens=False)  # the template writes them itself

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Of one that is much too long, only as much is tokenized as shows that."""
        num_chars = self.max_context * _TRIAL_CHARS_PER_TOKEN
        while num_chars < len(text):
            num_tokens = len(self.codec.encode(text[:num_chars], add_special_tokens=False))
            if num_tokens > self.max_context + _TRIAL_SLACK:
                raise ContextLengthExceeded(
                    f"the first {num_chars} characters of the prompt, which has {len(text)}, are {num_tokens} tokens, "
                    f"the context has {self.max_context}",
                    metadata={
                        "field": "prompt",
                        "value": f"{len(text)} characters",
                        "accepted": f"at most {self.max_context - 1} tokens",
                    },
                )
            num_chars *= _TRIAL_GROWTH
        return self.codec.encode(text, add_special_tokens=add_special_tokens)
