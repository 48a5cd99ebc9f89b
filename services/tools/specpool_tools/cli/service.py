"""`specpool target|speculator|router`: the service entry points, their flags made from the settings classes."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from specpool.config import FieldDoc, describe, load_config
from specpool.errors import ConfigError
from specpool.paths import write_atomically
from specpool_tools.models.resolve import resolve_model

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


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def build_parser(role: str, fields: Sequence[FieldDoc], what: str = "") -> argparse.ArgumentParser:
    """One flag per setting. Values stay text: `load_config` converts them like those of every other source."""
    parser = _Parser(
        prog=f"specpool {role}",
        description=f"{what or f'Run a {role}'}. Precedence of settings: flag, environment, --config file, default.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and exit")
    if not any(field.name == "ready_file" for field in fields):
        parser.add_argument("--ready-file", metavar="FILE", help="write the endpoint there once this serves")
    for field in fields:
        default = "required" if field.required else f"default {_shown(field.default)}"
        text = f"{field.doc} [{default}; {field.variable(role)}]".replace("%", "%%")
        parser.add_argument(field.flag, dest=field.name, metavar=field.type_name.upper()[:24], help=text)
    return parser


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "''" if value == "" else str(value)


def resolve_config(role: str, arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The settings from all sources, and the options that are not settings."""
    cls = config_class(role)
    fields = describe(cls)
    options = build_parser(role, fields).parse_args(list(arguments))
    given = {field.name: getattr(options, field.name) for field in fields if hasattr(options, field.name)}
    config = load_config(cls, section=role, file=getattr(options, "config", None), flags=given)
    if getattr(config, "model", ""):
        config = dataclasses.replace(config, model=resolve_model(config.model))
    return config, options


def run_service(role: str, arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    config, options = resolve_config(role, arguments)
    if getattr(options, "print_config", False):
        print_config(role, config)
        return
    _prepare_process(role, config)
    serve = _module(role, "server").serve
    with _progress(serve) as extra:
        asyncio.run(serve(config, on_ready=_announcer(role, getattr(options, "ready_file", "")), **extra))


def resolve_up(arguments: Sequence[str]) -> tuple[Any, Path | None]:
    """Options of `specpool up` from all sources, and the settings file, which its processes read too."""
    from specpool_tools.local.processes import UpConfig

    fields = describe(UpConfig)
    options = build_parser("up", fields, "Start router, targets, speculator and session store").parse_args(
        list(arguments)
    )
    given = {field.name: getattr(options, field.name) for field in fields if hasattr(options, field.name)}
    file = getattr(options, "config", None)
    config = load_config(UpConfig, section="up", file=file, flags=given)
    if getattr(options, "print_config", False):
        print_config("up", config)
        raise SystemExit(0)
    return config, file.resolve() if file else None


def print_config(role: str, config: Any) -> None:
    """As YAML that --config would accept."""
    import yaml

    plain = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
    yaml.safe_dump({role: plain}, sys.stdout, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _prepare_process(role: str, config: Any) -> None:
    """Cores and threads first: what torch starts when it is loaded inherits them."""
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
    """Progress of model loading for a `serve` that reports it."""

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
