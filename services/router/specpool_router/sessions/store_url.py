"""The URL of the session store: what is accepted, and what of it may be shown.

A URL may hold a password, and a wrong one may hold it anywhere: an unescaped `/` ends the host for a parser, and what
follows looks like a path. So nothing of a URL is shown that is not known to be harmless, and the library's own messages
about a URL, which quote pieces of it, are not passed on.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import SplitResult, parse_qsl, urlsplit

from specpool.errors import ConfigError

ACCEPTED: Final = "redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://... (TLS), unix://SOCKET or memory://"
_SCHEMES: Final = ("redis", "rediss", "unix")
_HIDDEN: Final = "***"
_OPTIONS: Final = ("db", "username", "password", "client_name")
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
_SHOWN_OPTIONS: Final = ("db", "username", "client_name", *_TLS_OPTIONS)
_ENCODE: Final = "'/', '?', '#', '@', '[' and ']' in a user name or password must be percent-encoded ('/' is %2F)"
_LAST_PORT: Final = 65535
_ADDRESS: Final = re.compile(r"[\w.-]*(:\d*)?", re.ASCII)


def check_store_url(url: str) -> None:
    """Raise ConfigError unless ``url`` names a server without any doubt."""
    parts = _split(url)
    if parts is None or parts.scheme not in _SCHEMES:
        raise _invalid(url, f"it cannot be read; {_ENCODE}")
    if _is_ambiguous(parts):
        raise _invalid(url, _ENCODE)
    if parts.scheme == "unix":
        if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
            raise _invalid(url, "unix:// must be followed by the absolute path of a socket")
    else:
        _check_host(url, parts)
    _check_options(url, parts)


def without_password(url: str) -> str:
    """The URL without its password, as it may be shown."""
    parts = _split(url)
    if parts is None or _is_ambiguous(parts):
        scheme, separator, _ = url.partition("://")
        if separator and scheme.isalnum():
            return f"{scheme}://{_HIDDEN}"
        return url if _ADDRESS.fullmatch(url) else _HIDDEN
    user_info, at, host = parts.netloc.rpartition("@")
    user, colon, _ = user_info.partition(":")
    shown_user = f"{user}:{_HIDDEN}" if colon else _HIDDEN
    query = "&".join(_shown(option) for option in parts.query.split("&")) if parts.query else ""
    netloc = f"{shown_user}@{host}" if at else host
    return f"{parts.scheme}://{netloc}{parts.path}" + (f"?{query}" if query else "")


def _split(url: str) -> SplitResult | None:
    """The parts of a URL that has a host or a path; None for what does not look like one."""
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme.isalnum() or not url.isprintable():
        return None
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _is_ambiguous(parts: SplitResult) -> bool:
    """Whether a part of a password may have ended up outside of its place."""
    misplaced = "@" in parts.path or "@" in parts.query or bool(parts.fragment)
    return misplaced or not (parts.scheme == "unix" or _has_a_host_only(parts))


def _has_a_host_only(parts: SplitResult) -> bool:
    """A "host" such as `:secret` or `user:secret` is the beginning of a password with a `/`."""
    try:
        return parts.port is None or 0 <= parts.port <= _LAST_PORT
    except ValueError:
        return False


def _check_host(url: str, parts: SplitResult) -> None:
    if not parts.hostname:
        raise _invalid(url, "the host is missing")
    database = parts.path.removeprefix("/")
    if database and not (database.isascii() and database.isdigit()):
        raise _invalid(url, "what follows the host must be the number of a database, as in /0")


def _check_options(url: str, parts: SplitResult) -> None:
    accepted = (*_OPTIONS, *_TLS_OPTIONS) if parts.scheme == "rediss" else _OPTIONS
    given = [option.partition("=")[0] for option in parts.query.split("&") if option]
    if set(given) - set(accepted):
        raise _invalid(url, f"it has unknown options; accepted after '?': {', '.join(accepted)}")
    values = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "db" in values and not (values["db"].isascii() and values["db"].isdigit()):
        raise _invalid(url, "db must be the number of a database")
    if values.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        raise _invalid(url, "ssl_cert_reqs must be none, optional or required")


def _shown(option: str) -> str:
    name, equals, value = option.partition("=")
    if name in _SHOWN_OPTIONS:
        return f"{name}{equals}{value}"
    return f"{name}={_HIDDEN}" if name == "password" else _HIDDEN


def _invalid(url: str, problem: str) -> ConfigError:
    shown = without_password(url)
    return ConfigError(
        f"session_store is {shown!r}: {problem}. Accepted: {ACCEPTED}",
        metadata={"field": "session_store", "value": shown, "accepted": ACCEPTED},
    )
