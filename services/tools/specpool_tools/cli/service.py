"""`specpool target|speculator|router`: the service entry points, their flags made from the settings classes."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specpool.config.sources import Parser, load_config, parse_flags
from specpool.errors import ConfigError
from specpool.paths import write_atomically
from specpool.shutdown import StopEvent
from specpool_tools.models.catalogue import resolve_model

ROLES: Mapping[str, str] = {
    "target": "TargetConfig",
    "speculator": "SpeculatorConfig",
    "router": "RouterConfig",
}


def config_class(role: str) -> Any:
    """The settings class of a role."""
    return getattr(_module(role, "config"), ROLES[role])


def _module(role: str, name: str) -> Any:
    try:
        return importlib.import_module(f"specpool_{role}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("specpool"):
            raise
        raise ConfigError(
            f"the {role} needs the package {error.name}: pip install 'specpool[{role}]'", reason="MISSING_EXTRA"
        ) from error


def build_parser(role: str, what: str = "") -> Parser:
    """A parser of the options that are no settings."""
    parser = Parser(
        prog=f"specpool {role}",
        description=f"{what or f'Run a {role}'}. Precedence of settings: flag, environment, --config file, default.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", default=None, help="YAML file with settings")
    parser.add_argument(
        "--print-config", action="store_true", default=False, help="show the resolved settings and exit"
    )
    return parser


def resolve_config(role: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The settings from all sources, and the options that are not settings."""
    parser = build_parser(role)
    parser.add_argument("--ready-file", metavar="FILE", default="", help="write the endpoint there once this serves")
    flags, options = parse_flags(config_class(role), role, arguments, parser)
    config = load_config(config_class(role), section=role, file=options.config, flags=flags)
    if getattr(config, "model", ""):
        config = config.model_copy(update={"model": resolve_model(config.model)})
    return config, options


def run_service(role: str, arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    config, options = resolve_config(role, arguments)
    if options.print_config:
        print_config(role, config)
        return
    _prepare_process(role, config)
    serve = _module(role, "server").serve
    with _progress(serve) as extra:
        stop = StopEvent(drain_grace_s=config.drain_grace_s)
        asyncio.run(serve(config, on_ready=_announcer(role, options.ready_file), stop=stop, **extra))


def resolve_up(arguments: Sequence[str]) -> tuple[Any, Path | None]:
    """Options of `specpool up` from all sources, and the settings file, which its processes read too."""
    from specpool_tools.local.up_config import UpConfig

    parser = build_parser("up", "Start router, targets, speculator and session store")
    flags, options = parse_flags(UpConfig, "up", arguments, parser)
    config = load_config(UpConfig, section="up", file=options.config, flags=flags)
    if options.print_config:
        print_config("up", config)
        raise SystemExit(0)
    return config, options.config.resolve() if options.config else None


def print_config(role: str, config: Any) -> None:
    """Print the settings as YAML that --config would accept."""
    import yaml

    yaml.safe_dump({role: config.model_dump(mode="json")}, sys.stdout, sort_keys=False)


def _prepare_process(role: str, config: Any) -> None:
    """Set cores and threads first: what torch starts when it is loaded inherits them."""
    from specpool.logging import setup_logging
    from specpool.process import set_cpu_affinity, set_num_threads

    setup_logging(config.log_level, name=role)
    set_cpu_affinity(getattr(config, "cpu_affinity", ()))
    set_num_threads(getattr(config, "num_threads", 0))


def _announcer(role: str, ready_file: str) -> Callable[[str], None]:
    def announce(endpoint: str) -> None:
        print(f"{role} serves at {endpoint}", flush=True)
        if ready_file:
            write_atomically(Path(ready_file), endpoint + "\n")

    return announce


class _progress:
    """Shows the progress of model loading for a `serve` that reports it."""

    def __init__(self, serve: Callable[..., Any]) -> None:
        self._wanted = "on_progress" in inspect.signature(serve).parameters

    def __enter__(self) -> dict[str, Any]:
        if not self._wanted:
            return {}
        from specpool_tools.cli.progress import StageProgress

        self._stages = StageProgress()
        return {"on_progress": self._stages}

    def __exit__(self, *unused: object) -> None:
        if self._wanted:
            self._stages.close()
