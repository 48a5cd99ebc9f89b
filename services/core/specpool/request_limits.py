"""How large a request may be, checked before anything of it is converted, tokenized, stored or passed on.

Routers and targets check alike; the numbers are documented in the protocol (`inference.proto`, `types.proto`), which
says the same. Values (a temperature, a token id) are checked by the target alone, which knows the model.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Final

from specpool.errors import ContextLengthExceeded, InvalidArgument
from specpool.v1 import inference_pb2, types_pb2

MAX_REQUEST_ID_CHARS: Final = 128
MAX_SESSION_ID_CHARS: Final = 256
MAX_MODEL_NAME_CHARS: Final = 256
MAX_TENANT_NAME_CHARS: Final = 128
MAX_STOP_STRINGS: Final = 32
MAX_STOP_STRING_CHARS: Final = 512
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_LOGIT_BIASES: Final = 1024
MAX_CHAT_MESSAGES: Final = 4096
MAX_ROLE_CHARS: Final = 64
_MAX_SHOWN_CHARS: Final = 100


def check_request(request: inference_pb2.GenerateRequest) -> None:
    """Refuse names, lists and strings that are longer than any request needs.

    Takes microseconds, whatever the size. Raises InvalidArgument, which names the field, the value and what is
    accepted.
    """
    check_text("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
    check_text("session_id", request.session_id, MAX_SESSION_ID_CHARS)
    check_text("model", request.model, MAX_MODEL_NAME_CHARS)
    _check_sampling(request.sampling)
    if request.HasField("chat"):
        check_number("chat.messages", request.chat.messages, MAX_CHAT_MESSAGES)
        for message in request.chat.messages:
            if len(message.role) > MAX_ROLE_CHARS:
                raise invalid_value("chat.messages.role", message.role, f"at most {MAX_ROLE_CHARS} characters long")


def check_prompt_size(request: inference_pb2.GenerateRequest, *, max_context: int, max_prompt_chars: int) -> None:
    """Refuse a prompt that no tokenizer could bring into the context.

    Args:
        request: of a client.
        max_context: tokens of the model's context; 0 is unknown, and not checked.
        max_prompt_chars: `ModelInfo.max_prompt_chars`; 0 is unknown, and not checked.
    """
    num_tokens = len(request.tokens.token_ids)
    if num_tokens > max_context > 0:
        raise ContextLengthExceeded(
            f"tokens.token_ids must be at most {max_context} tokens, the context of the model, got {num_tokens}",
            metadata={"field": "tokens.token_ids", "value": num_tokens, "accepted": f"at most {max_context}"},
        )
    field = "chat.messages.content" if request.HasField("chat") else "text"
    num_chars = len(request.text) + sum(len(message.content) for message in request.chat.messages)
    if num_chars > max_prompt_chars > 0:
        raise ContextLengthExceeded(
            f"{field} must be at most {max_prompt_chars} characters in all, which the context of {max_context} tokens "
            f"can hold, got {num_chars}",
            metadata={"field": field, "value": num_chars, "accepted": f"at most {max_prompt_chars}"},
        )


def check_text(field: str, text: str, max_chars: int) -> None:
    """Refuse a name that is longer than `max_chars` characters or has some that cannot be printed in one line."""
    if len(text) > max_chars or not text.isprintable():
        raise invalid_value(field, repr(text[:_MAX_SHOWN_CHARS]), f"at most {max_chars} printable characters")


def check_number(field: str, values: Sized, most: int) -> None:
    """Refuse a list that is longer than `most`. Raises InvalidArgument."""
    if len(values) > most:
        raise invalid_value(field, len(values), f"at most {most} in number")


def invalid_value(field: str, value: object, accepted: str) -> InvalidArgument:
    """The error that names a field, its value (the beginning of a long one) and what is accepted."""
    shown = str(value)
    shown = shown if len(shown) <= _MAX_SHOWN_CHARS else shown[:_MAX_SHOWN_CHARS] + "..."
    return InvalidArgument(
        f"{field} must be {accepted}, got {shown}", metadata={"field": field, "value": shown, "accepted": accepted}
    )


def _check_sampling(sampling: types_pb2.SamplingParams) -> None:
    check_number("stop", sampling.stop, MAX_STOP_STRINGS)
    for stop in sampling.stop:
        if len(stop) > MAX_STOP_STRING_CHARS:
            raise invalid_value("stop", stop, f"strings of at most {MAX_STOP_STRING_CHARS} characters")
    check_number("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKEN_IDS)
    check_number("logit_bias", sampling.logit_bias, MAX_LOGIT_BIASES)
