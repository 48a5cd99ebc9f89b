"""`specpool generate`, and how it and `specpool chat` make their requests. Never imports torch."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field

from specpool.client import Client, Completion, valid_text
from specpool.errors import InvalidArgument
from specpool.v1 import inference_pb2, types_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """Everything about a request but its prompt; None leaves the server's default."""

    endpoint: str
    model: str = ""
    mode: str = "ssd"
    verification: str = "coupled"
    max_lookahead: int | None = None
    api_key: str = ""
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    """Optional scalar fields of SamplingParams by name."""
    logit_bias: tuple[str, ...] = ()
    """Biases of tokens, each as `TOKEN_ID=BIAS`."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


def sampling_params(options: GenerateOptions) -> types_pb2.SamplingParams:
    """The sampling parameters as a message; a value that it cannot hold is a bad argument."""
    given = {name: value for name, value in options.numbers.items() if value is not None}
    params = types_pb2.SamplingParams(ignore_eos=options.ignore_eos, stop=options.stop)
    for name, value in given.items():
        try:
            setattr(params, name, value)
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"{name} cannot be {value}: {error}") from error
    try:
        params.stop_token_ids.extend(options.stop_token_ids)
    except ValueError as error:
        raise InvalidArgument(f"bad stop token id: {error}", metadata={"field": "stop_token_ids"}) from error
    for item in options.logit_bias:
        token, _, bias = item.partition("=")
        try:
            params.logit_bias[int(token)] = float(bias)
        except ValueError as error:
            raise InvalidArgument(
                f"logit_bias must be TOKEN_ID=BIAS, such as 50256=-100, got {item!r}",
                metadata={"field": "logit_bias", "value": item, "accepted": "TOKEN_ID=BIAS"},
            ) from error
    return params


def build_request(options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request without its prompt."""
    request = inference_pb2.GenerateRequest(
        model=options.model,
        sampling=sampling_params(options),
        mode=types_pb2.SpeculationMode.Value(f"SPECULATION_MODE_{options.mode.upper()}"),
        verification=types_pb2.VerificationMode.Value(f"VERIFICATION_MODE_{options.verification.upper()}"),
    )
    if options.max_lookahead is not None:
        if options.max_lookahead < 0:
            raise InvalidArgument(f"lookahead must be >= 0, got {options.max_lookahead}")
        request.max_lookahead = options.max_lookahead
    return request


def chat_messages(*messages: tuple[str, str]) -> inference_pb2.ChatPrompt:
    """A chat of (role, content) pairs; empty contents are left out."""
    return inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in messages if text]
    )


def run_generate(prompt: str, options: GenerateOptions, *, chat: bool, system: str, output: str, stats: bool) -> None:
    """Send one prompt; stream text, or print one JSON object at the end."""
    if system and not chat:
        raise InvalidArgument(
            "--system needs --chat: a raw prompt has no system message",
            metadata={"field": "system", "accepted": "together with --chat"},
        )
    with valid_text():
        request = build_request(options)
        if chat:
            request.chat.CopyFrom(inference_pb2.ChatPrompt(messages=[]))
            request.chat.MergeFrom(chat_messages(("system", system)))
            request.chat.messages.add(role="user", content=prompt)
        else:
            request.text = prompt
    completion = Completion()
    asyncio.run(stream_into(completion, request, options, echo=output == "text"))
    if output == "json":
        from specpool_tools.cli.formats import completion_document

        print(json.dumps(completion_document(completion), ensure_ascii=False))
        return
    if not completion.text.endswith("\n"):
        print()
    if stats:
        print(describe_stats(completion, mode=options.mode), file=sys.stderr)


async def stream_into(
    completion: Completion, request: inference_pb2.GenerateRequest, options: GenerateOptions, *, echo: bool
) -> None:
    """Stream an answer into `completion`, which has what had come if this is cancelled; `echo` prints the text."""
    async with Client(options.endpoint, api_key=options.api_key) as client:
        async for event in client.stream(request):
            completion.add(event)
            if echo and event.HasField("delta"):
                print(event.delta.text, end="", flush=True)


def describe_stats(completion: Completion, *, mode: str) -> str:
    """The statistics of a completion in `mode`, one line for people."""
    stats, num_tokens = completion.stats, len(completion.token_ids)
    decode_s = stats.seconds - stats.seconds_to_first_token
    speed = (num_tokens - 1) / decode_s if decode_s > 0 else 0.0
    line = f"{num_tokens} tokens, {speed:.1f} tokens/s, {stats.num_rounds} rounds"
    if mode == "off" or not stats.num_rounds:
        return line
    if not stats.num_draft_tokens:
        return f"{line}, nothing drafted: speculation pauses while plain decoding is faster, or has no speculator"
    line += f", {stats.num_accepted_tokens / stats.num_rounds:.2f} draft tokens accepted a round"
    lookups = stats.num_hits + stats.num_partial + stats.num_misses
    if lookups:
        rate = (stats.num_hits + stats.num_partial) / lookups
        line += f", hit rate {rate:.0%} ({stats.num_hits} full, {stats.num_partial} partial)"
    return line
