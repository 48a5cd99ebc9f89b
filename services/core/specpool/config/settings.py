"""What all classes of settings have in common: frozen, by keyword only, help from the docstring under each field."""

from __future__ import annotations

import socket
from typing import Annotated, Any, ClassVar, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from specpool.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]
"""A part of a whole that is never nothing: more than 0, at most 1."""

_OTLP_HTTP_PORT: Final = 4318
_WORDS: Final = {
    "missing": "given",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}
"""What is accepted, in words, for each of pydantic's kinds of errors."""


class Settings(BaseModel):
    """Settings of one component. Whatever contradicts the types or another setting is a `ConfigError`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _in_words(cls, value: object, info: ValidationInfo) -> object:
        """Read what pydantic does not know of text: lists with commas, none; and that a boolean is no number."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            if get_origin(kind) is not Literal:
                raise ValueError("no boolean")
            return "on" if value else "off"  # YAML reads these bare words as booleans
        if not isinstance(value, str):
            return value
        if get_origin(kind) is tuple:
            return tuple(part.strip() for part in value.split(",")) if value.strip() else ()
        is_optional = type(None) in get_args(kind)
        return None if is_optional and value.strip().lower() in ("", "none", "null") else value


def grpc_collector(value: str) -> str:
    """An OTLP endpoint, if it can be one for gRPC: the HTTP port or a path would lose every span without a word."""
    url = urlsplit(value if "://" in value else f"http://{value}")
    try:
        is_http = url.port == _OTLP_HTTP_PORT or url.path not in ("", "/") or url.scheme not in ("http", "https")
    except ValueError:  # no number
        is_http = True
    if value and is_http:
        raise ValueError(
            f"HOST:PORT of OTLP over gRPC (usually port 4317), without a path: HTTP ({_OTLP_HTTP_PORT}) is not spoken"
        )
    return value


class ServiceSettings(Settings):
    """The settings that every service has."""

    role: ClassVar[str]
    """Kind of service, target, speculator or router: the section of the file, and the end of the default `id`."""

    id: str = Field(default="", validate_default=True)
    """Stable name of this process; empty: host name and role."""
    listen: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes any free one."""
    advertise: str = ""
    """Endpoint that others dial; empty for the bound one."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes any free one, unset is off."""
    otlp_endpoint: str = ""
    """OTLP collector for traces, HOST:PORT or URL of its gRPC port (usually 4317); empty is off."""
    trace_sampling_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of traces started here that are recorded; a parent's decision wins."""
    drain_grace_s: NonNegativeFloat = 30.0
    """How long a graceful stop waits for what runs."""
    log_level: str = "info"
    """debug, info, warning or error."""

    _otlp_is_grpc = field_validator("otlp_endpoint")(grpc_collector)

    @field_validator("id")
    @classmethod
    def _named(cls, value: str) -> str:
        return value or f"{socket.gethostname()}-{cls.role}"


def invalid(name: str, value: object, accepted: str) -> ConfigError:
    """The error of a setting whose value is not accepted, alone or beside another one."""
    return ConfigError(
        f"{name} must be {accepted}, got {value!r}", metadata={"field": name, "value": value, "accepted": accepted}
    )


def _config_error(error: ValidationError) -> ConfigError:
    """The error that names, in our words, the first of what is wrong."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown setting {name}", metadata={"field": name})
    accepted = _WORDS.get(first["type"], "").format(**first.get("ctx", {}))
    accepted = accepted or first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return invalid(name, None if first["type"] == "missing" else first["input"], accepted)
