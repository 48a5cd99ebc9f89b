"""`specpool demo`: two real models, three processes, one prompt, with SSD and without."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from specpool.client import Client, Completion
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.system import running_system
from specpool_tools.cli.generate import GenerateOptions, build_request, chat_messages
from specpool_tools.cli.models import run_fetch
from specpool_tools.models.catalogue import known_models
from specpool_tools.models.fetch import Source

_PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain it in two sentences."


def run_demo(target: str, draft: str, *, prompt: str, max_tokens: int) -> None:
    """Fetch both models, start everything, stream an answer in both modes, and print a summary."""
    console = Console()
    # First of all: without torch this fails, and gigabytes would have been fetched for nothing.
    arguments = ("--target", target, "--draft", draft, "--lookahead", "3", *recommended_arguments())
    run_fetch([name for name in (target, draft) if name in known_models()], Source.AUTO)
    console.print(f"starting router, target ({target}), speculator ({draft}) and session store ...")
    with running_system(arguments) as endpoint:
        options = GenerateOptions(endpoint=endpoint, numbers={"max_tokens": max_tokens, "temperature": 0.0})
        text = prompt or _PROMPT
        asyncio.run(_answer(replace(options, numbers={"max_tokens": 8}), text, echo=False))  # warm-up
        console.rule("mode ssd")
        ssd = asyncio.run(_answer(options, text, echo=True))
        console.rule("mode off (plain decoding)")
        off = asyncio.run(_answer(replace(options, mode="off"), text, echo=True))
    console.print(summary(ssd, off))
    console.print(comparison(ssd, off))


def comparison(ssd: Completion, off: Completion) -> str:
    """A line on whether speculation changed the tokens; in bfloat16 it may, where two are almost equally likely."""
    pairs = zip(ssd.token_ids, off.token_ids, strict=False)
    first = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    if first is None:
        return "same tokens in both modes"
    return (
        f"the answers differ from token {first} on: rounding can flip near-ties in bfloat16; "
        "in float32 they are equal (make verify)"
    )


async def _answer(options: GenerateOptions, prompt: str, *, echo: bool) -> Completion:
    request = build_request(options)
    request.chat.CopyFrom(chat_messages(("user", prompt)))
    completion = Completion()
    async with Client(options.endpoint) as client:
        async for event in client.stream(request):
            completion.add(event)
            if echo and event.HasField("delta"):
                print(event.delta.text, end="", flush=True)
    if echo:
        print()
    return completion


def tokens_per_second(completion: Completion) -> float:
    """Tokens per second after the first token, which the prefill gives."""
    decode_s = completion.stats.seconds - completion.stats.seconds_to_first_token
    return (len(completion.token_ids) - 1) / decode_s if decode_s > 0 else 0.0


def hit_rate(completion: Completion) -> float:
    """Share of rounds whose outcome had been guessed, with at least one token drafted for it."""
    stats = completion.stats
    lookups = stats.num_hits + stats.num_partial + stats.num_misses
    return (stats.num_hits + stats.num_partial) / lookups if lookups else 0.0


def summary(ssd: Completion, off: Completion) -> Table:
    """A table with both modes side by side."""
    table = Table("mode", "tokens/s", "ratio", "hit rate", "accepted length", title="summary")
    plain = tokens_per_second(off)
    rounds = ssd.stats.num_rounds or 1
    table.add_row(
        "ssd",
        f"{tokens_per_second(ssd):.2f}",
        f"{tokens_per_second(ssd) / plain:.2f}" if plain else "-",
        f"{hit_rate(ssd):.0%}",
        f"{ssd.stats.num_accepted_tokens / rounds:.2f} draft tokens a round",
    )
    table.add_row("off", f"{plain:.2f}", "1.00", "-", "-")
    return table
