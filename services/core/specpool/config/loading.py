"""Settings from flags, environment and file, in this precedence, over the defaults of a frozen dataclass.

=============  ==============================================================
flag           ``--max-lookahead 4``
environment    ``SPECPOOL_TARGET_MAX_LOOKAHEAD=4``
file (YAML)    ``target:`` / ``  max_lookahead: 4``
=============  ==============================================================

Unknown keys are refused by name, with the nearest accepted spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_type_hints

import yaml

from specpool.config.conversion import accepted, convert
from specpool.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SECTIONS: Final = ("target", "speculator", "router", "up")
_Config = TypeVar("_Config", bound="DataclassInstance")

# Kubernetes gives every container variables about the services of its namespace. For a service named
# "specpool-target" they look like settings: SPECPOOL_TARGET_SERVICE_HOST, SPECPOOL_TARGET_PORT=tcp://...
_SERVICE_LINK_NAME: Final = re.compile(
    r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://")


@dataclasses.dataclass(frozen=True, slots=True)
class _Setting:
    """One value and where it was found."""

    value: object
    origin: str


def load_config(
    cls: type[_Config],
    *,
    section: str,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> _Config:
    """Build ``cls`` from all sources.

    Args:
        cls: a frozen dataclass.
        section: of the file and of the variables' prefix.
        file: YAML; None: no file.
        flags: by field name; None values were not given.
        environ: default: the process's.

    Raises:
        ConfigError: naming the field or key, the value, and what is accepted.
    """
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    settings = _from_file(file, section, names)
    settings |= _from_environment(os.environ if environ is None else environ, section, names)
    settings |= _from_flags(flags or {}, names)
    types = get_type_hints(cls)
    values = {name: _convert(name, setting, types[name]) for name, setting in settings.items()}
    _require(cls, section, values)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{section}: {error}") from error


def flag_name(field: str) -> str:
    """``max_lookahead`` -> ``--max-lookahead``."""
    return "--" + field.replace("_", "-")


def variable_name(section: str, field: str) -> str:
    """``target``, ``max_lookahead`` -> ``SPECPOOL_TARGET_MAX_LOOKAHEAD``."""
    return _prefix(section) + field.upper()


def _from_flags(flags: Mapping[str, object], names: Iterable[str]) -> dict[str, _Setting]:
    given = {name: value for name, value in flags.items() if value is not None}
    _refuse_unknown(given, names, "flag", flag_name)
    return {name: _Setting(value, f"flag {flag_name(name)}") for name, value in given.items()}


def _from_environment(environ: Mapping[str, str], section: str, names: Iterable[str]) -> dict[str, _Setting]:
    prefix = _prefix(section)
    by_variable = {variable_name(section, name): name for name in names}
    given = {
        variable: value
        for variable, value in environ.items()
        if variable.startswith(prefix) and not _is_service_link(variable.removeprefix(prefix), value)
    }
    _refuse_unknown(given, by_variable, "environment variable", str)
    return {
        by_variable[variable]: _Setting(value, f"environment variable {variable}") for variable, value in given.items()
    }


def _from_file(file: Path | None, section: str, names: Iterable[str]) -> dict[str, _Setting]:
    if file is None:
        return {}
    document = _mapping(_read_yaml(file), str(file))
    _refuse_unknown(document, SECTIONS, f"{file}: section", str)
    values = _mapping(document.get(section), f"{file}: {section}")
    _refuse_unknown(values, names, f"{file}: key", lambda name: f"{section}.{name}")
    return {name: _Setting(value, f"{file}: {section}.{name}") for name, value in values.items()}


def _read_yaml(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings file {file}: {error.strerror}", metadata={"file": file}) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}", metadata={"file": file}) from error


def _mapping(value: object, origin: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} must be a mapping of keys to values, got {value!r}", metadata={"file": origin})
    return {str(key): entry for key, entry in value.items()}


def _convert(name: str, setting: _Setting, kind: Any) -> object:
    try:
        return convert(setting.value, kind)
    except ValueError as error:
        expected = accepted(kind)
        raise ConfigError(
            f"{name} must be {expected}, got {setting.value!r} ({setting.origin})",
            metadata={"field": name, "value": setting.value, "accepted": expected, "origin": setting.origin},
        ) from error


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str, spell: Any) -> None:
    candidates = list(known)
    for key in given:
        if key not in candidates:
            nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
            hint = f"; did you mean {spell(nearest[0])}?" if nearest else ""
            raise ConfigError(
                f"unknown {what} {spell(key)}{hint}",
                metadata={"field": key, "accepted": spell(nearest[0]) if nearest else ""},
            )


def _require(cls: type[_Config], section: str, values: Mapping[str, object]) -> None:
    for field in dataclasses.fields(cls):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.init and not has_default and field.name not in values:
            raise ConfigError(
                f"{field.name} is required: give {flag_name(field.name)}, {variable_name(section, field.name)} "
                f"or {section}.{field.name} in the settings file",
                metadata={"field": field.name, "accepted": accepted(get_type_hints(cls)[field.name])},
            )


def _prefix(section: str) -> str:
    return f"SPECPOOL_{section.upper()}_"


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK_NAME.fullmatch(name):
        return True
    return (name == "PORT" or name.endswith("_PORT")) and _SERVICE_LINK_VALUE.match(value) is not None
