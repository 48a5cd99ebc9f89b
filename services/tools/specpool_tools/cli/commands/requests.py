"""Commands that talk to a router: `generate`, `chat`, `status`."""

from __future__ import annotations

from typing import Annotated

import typer

from specpool_tools.cli.commands.options import ApiKey, Endpoint, Mode, Output, Verification, group
from specpool_tools.cli.errors import handled

app = group()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Raw text; with --chat a user's message.")],
    mode: Annotated[Mode, typer.Option(help="ssd, sd (draft, then verify) or off (plain decoding).")] = Mode.SSD,
    verification: Annotated[Verification, typer.Option(help="How draft tokens are accepted.")] = Verification.COUPLED,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="(0, 1]")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="[0, 1]")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="> 0; 1 is off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="[-2, 2]")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="[-2, 2]")] = None,
    logit_bias: Annotated[list[str] | None, typer.Option(help="TOKEN_ID=BIAS; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn by the target.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default 128.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; repeatable.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    lookahead: Annotated[int | None, typer.Option(help="Most draft tokens per round (K).")] = None,
    output: Annotated[Output, typer.Option(help="Streamed text, or one JSON object.")] = Output.TEXT,
    stats: Annotated[bool, typer.Option("--stats", help="Print a line of statistics on standard error.")] = False,
    endpoint: Endpoint = "",
    model: Annotated[str, typer.Option(help="Name of a served model.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Apply the target's chat template.")] = False,
    system: Annotated[str, typer.Option(help="System message; needs --chat.")] = "",
    api_key: ApiKey = "",
) -> None:
    """Generate a completion of PROMPT."""
    with handled():
        from specpool_tools.cli.generate import GenerateOptions, run_generate
        from specpool_tools.local.endpoint import resolve_endpoint

        options = GenerateOptions(
            endpoint=resolve_endpoint(endpoint),
            model=model,
            mode=mode,
            verification=verification,
            max_lookahead=lookahead,
            api_key=api_key,
            numbers={
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "seed": seed,
                "max_tokens": max_tokens,
            },
            logit_bias=tuple(logit_bias or ()),
            stop=tuple(stop or ()),
            stop_token_ids=tuple(stop_token_id or ()),
            ignore_eos=ignore_eos,
        )
        run_generate(prompt, options, chat=chat, system=system, output=output, stats=stats)


@app.command()
def chat(
    mode: Annotated[Mode, typer.Option(help="How to speculate.")] = Mode.SSD,
    verification: Annotated[Verification, typer.Option(help="How draft tokens are accepted.")] = Verification.COUPLED,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn by the target.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Per answer.")] = 512,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    endpoint: Endpoint = "",
    model: Annotated[str, typer.Option(help="Name of a served model.")] = "",
    api_key: ApiKey = "",
) -> None:
    """Chat with the served model."""
    with handled():
        from specpool_tools.cli.chat import run_chat
        from specpool_tools.cli.generate import GenerateOptions
        from specpool_tools.local.endpoint import resolve_endpoint

        options = GenerateOptions(
            endpoint=resolve_endpoint(endpoint),
            model=model,
            mode=mode,
            verification=verification,
            api_key=api_key,
            numbers={"temperature": temperature, "seed": seed, "max_tokens": max_tokens},
        )
        run_chat(options, system=system)


@app.command()
def status(
    output: Annotated[Output, typer.Option(help="Lines, or one JSON object.")] = Output.TEXT,
    endpoint: Endpoint = "",
    api_key: ApiKey = "",
) -> None:
    """Targets, speculators, incarnations, transports, models and load."""
    with handled():
        from specpool_tools.cli.status import run_status
        from specpool_tools.local.endpoint import resolve_endpoint

        run_status(resolve_endpoint(endpoint), output=output, api_key=api_key)
