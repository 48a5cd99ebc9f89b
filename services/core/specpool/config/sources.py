"""Settings from flags, environment and file, in this precedence, over the defaults of a class of settings.

=============  ==============================================================
flag           ``--max-lookahead 4``
environment    ``SPECPOOL_TARGET_MAX_LOOKAHEAD=4``
file (YAML)    ``target:`` / ``  max_lookahead: 4``
=============  ==============================================================

Flags, variables and help are those of pydantic-settings. Ours is what it does not promise: a file that is not there,
an unknown section and an unknown variable are errors, and every error says where its value came from.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict

from specpool.config.settings import Settings
from specpool.errors import ConfigError

SECTIONS: Final = ("target", "speculator", "router", "up")
_Config = TypeVar("_Config", bound=Settings)

# Kubernetes gives every container variables about the services of its namespace. For a service named
# "specpool-target" they look like settings: SPECPOOL_TARGET_SERVICE_HOST, SPECPOOL_TARGET_PORT=tcp://...
_SERVICE_LINK_NAME: Final = re.compile(
    r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line, like everything else here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse would print its usage and exit."""
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def parse_flags(
    cls: type[Settings], section: str, arguments: Sequence[str], parser: Parser
) -> tuple[dict[str, Any], argparse.Namespace]:
    """The values by the names of fields, as they were written, and the options that `parser` had before."""
    source: CliSettingsSource[Parser] = CliSettingsSource(_sources(cls, section), root_parser=parser)
    for action in parser._actions:
        if action.dest in cls.model_fields:
            action.metavar = accepted_words(cls.model_fields[action.dest].annotation)
    options = parser.parse_args(list(arguments))
    given = {name: value for name, value in vars(options).items() if name in cls.model_fields}
    source(parsed_args=given)
    return source(), options


def accepted_words(kind: Any) -> str:
    """What a flag takes, in a word for its help: the choices themselves, INT,... for a list with commas, TEXT."""
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind) if choice != "")
    if get_origin(kind) is Annotated:
        return accepted_words(get_args(kind)[0])
    if get_origin(kind) is tuple:
        return f"{accepted_words(get_args(kind)[0])},..."
    if get_origin(kind) in (Union, UnionType):
        words = (accepted_words(part) for part in get_args(kind) if part is not type(None))
        return "|".join(word for word in words if word)
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}.get(kind, "VALUE")


def load_config(
    cls: type[_Config], *, section: str, file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> _Config:
    """The settings from all sources.

    Args:
        cls: the class of settings.
        section: of the file, and of the variables' prefix.
        file: YAML; None: no file.
        flags: values by the names of fields.

    Raises:
        ConfigError: naming the field or key, the value, what is accepted, and where the value came from.
    """
    _refuse_unknown_variables(cls, section)
    in_file = _from_file(file, section, cls.model_fields)
    in_environment = _from_environment(cls, section)
    values = {**in_file, **in_environment, **(flags or {})}
    try:
        return cls(**values)
    except ConfigError as error:
        name = error.metadata.get("field", "")
        flag, variable = flag_name(name), variable_name(section, name)
        if name in cls.model_fields and name not in values and cls.model_fields[name].is_required():
            raise _explained(
                error, f"{name} is required: give {flag}, {variable} or {section}.{name} in the settings file"
            ) from None
        if name in (flags or {}):
            raise _explained(error, f"{error.message} (flag {flag})") from None
        if name in in_environment:
            raise _explained(error, f"{error.message} (environment variable {variable})") from None
        if name in in_file:
            raise _explained(error, f"{error.message} ({file}: {section}.{name})") from None
        raise


def _explained(error: ConfigError, message: str) -> ConfigError:
    return ConfigError(message, reason=error.reason, metadata=error.metadata)


def flag_name(field: str) -> str:
    """The flag of a field: ``--max-lookahead`` of ``max_lookahead``."""
    return "--" + field.replace("_", "-")


def variable_name(section: str, field: str) -> str:
    """The environment variable of a field: ``SPECPOOL_TARGET_MAX_LOOKAHEAD`` of ``target``, ``max_lookahead``."""
    return _prefix(section) + field.upper()


def _sources(cls: type[Settings], section: str) -> type[BaseSettings]:
    """A class with the same fields for pydantic-settings: what it reads stays text, which `cls` converts."""

    class Sources(cls, BaseSettings):  # type: ignore[misc, valid-type]
        model_config = SettingsConfigDict(
            env_prefix=_prefix(section),
            enable_decoding=False,
            cli_kebab_case=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="unset",
            cli_show_env_vars=True,
        )

    return Sources


def _prefix(section: str) -> str:
    return f"SPECPOOL_{section.upper()}_"


def _from_environment(cls: type[Settings], section: str) -> dict[str, Any]:
    found = EnvSettingsSource(_sources(cls, section))()
    return {name: value for name, value in found.items() if not _is_service_link(name.upper(), str(value))}


def _refuse_unknown_variables(cls: type[Settings], section: str) -> None:
    prefix = _prefix(section)
    given = [
        variable
        for variable, value in os.environ.items()
        if variable.startswith(prefix) and not _is_service_link(variable.removeprefix(prefix), value)
    ]
    known = [variable_name(section, name) for name in cls.model_fields]
    _refuse_unknown(given, known, "environment variable", str)


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK_NAME.fullmatch(name):
        return True
    return (name == "PORT" or name.endswith("_PORT")) and _SERVICE_LINK_VALUE.match(value) is not None


def _from_file(file: Path | None, section: str, names: Iterable[str]) -> dict[str, Any]:
    if file is None:
        return {}
    document = _mapping(_read_yaml(file), str(file))
    _refuse_unknown(document, SECTIONS, f"{file}: section", str)
    values = _mapping(document.get(section), f"{file}: {section}")
    _refuse_unknown(values, names, f"{file}: key", lambda name: f"{section}.{name}")
    return values


def _read_yaml(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings file {file}: {error.strerror}", metadata={"file": file}) from error
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, or a date that is none
        raise ConfigError(f"{file} is not valid YAML: {error}", metadata={"file": file}) from error


def _mapping(value: object, origin: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} must be a mapping of keys to values, got {value!r}", metadata={"file": origin})
    return {str(key): entry for key, entry in value.items()}


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str, spell: Callable[[str], str]) -> None:
    candidates = list(known)
    for key in given:
        if key not in candidates:
            nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
            hint = f"; did you mean {spell(nearest[0])}?" if nearest else ""
            raise ConfigError(
                f"unknown {what} {spell(key)}{hint}",
                metadata={"field": key, "accepted": spell(nearest[0]) if nearest else ""},
            )
