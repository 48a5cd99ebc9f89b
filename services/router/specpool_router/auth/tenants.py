"""Tenants: who calls, from verified credentials.

Tenants file (YAML); the key itself is never stored::

    tenants:
      - name: acme                      # at most 128 printable characters
        key_sha256: 64 lower-case hex digits, of the key's bytes
        weight: 2.0                     # optional, 1.0
        max_concurrent_requests: 8      # optional, 0: no limit
        tokens_per_minute: 100000       # optional, 0: no limit
        cache_salt: any text            # optional, at most 1,024 bytes; default: the name
        operator: true                  # optional; may drain the router
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from specpool.errors import ConfigError, Unauthenticated
from specpool.request_limits import MAX_TENANT_NAME_CHARS
from specpool.rpc.checks import MAX_SALT_BYTES, MAX_WEIGHT
from specpool_router.sessions.session_store import QuotaLimits

_KEYS = {"name", "key_sha256", "weight", "max_concurrent_requests", "tokens_per_minute", "cache_salt", "operator"}
_SHA256_HEX_DIGITS = 64
_MAX_NUMBER = 10**15
"""Largest limit: scripts of the session store count in float64, where every whole number up to here is exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Who a call is from, with limits and weight."""

    name: str
    weight: float = 1.0
    """Share of speculator rows relative to other tenants."""
    limits: QuotaLimits = field(default_factory=QuotaLimits)
    cache_salt: bytes = b""
    """Salt that keeps the tenant's prefix cache apart."""
    operator: bool = False
    """Whether the tenant may drain the router."""


DEFAULT_TENANT = Tenant(name="default", operator=True)


class Tenants:
    """The tenants by key: finds that of a call. Without a table everybody is `DEFAULT_TENANT`."""

    def __init__(self, by_key_hash: dict[str, Tenant] | None = None) -> None:
        self._by_key_hash = by_key_hash

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """The tenant of a call with this metadata. Raises Unauthenticated."""
        if self._by_key_hash is None:
            return DEFAULT_TENANT
        header = next((value for key, value in metadata if key == "authorization"), "")
        scheme, _, key = (header.decode(errors="replace") if isinstance(header, bytes) else header).partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("credentials are missing: send metadata 'authorization: Bearer KEY'")
        # Looking up a hash leaks nothing of the key by its timing.
        tenant = self._by_key_hash.get(hashlib.sha256(key.strip().encode()).hexdigest())
        if tenant is None:
            raise Unauthenticated("the key in 'authorization' is not known here")
        return tenant


def load_tenants(path: str) -> Tenants:
    """Read a tenants file; an empty path: everybody is the default tenant."""
    if not path:
        return Tenants()
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # no UTF-8, or a date that is none
        raise _invalid(path, f"cannot be read: {error}") from error
    if not isinstance(document, dict) or set(document) != {"tenants"} or not isinstance(document["tenants"], list):
        raise _invalid(path, "must have one key, 'tenants', with a list")
    table: dict[str, Tenant] = {}
    names: set[str] = set()
    for entry in document["tenants"]:
        key_hash, tenant = _parse(path, entry)
        if key_hash in table:
            raise _invalid(path, f"two tenants have the key of {tenant.name!r}")
        if tenant.name in names:
            raise _invalid(path, f"tenant {tenant.name!r} is there twice")
        names.add(tenant.name)
        table[key_hash] = tenant
    return Tenants(table)


def _parse(path: str, entry: Any) -> tuple[str, Tenant]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise _invalid(path, f"a tenant needs a name: {entry!r}")
    name = entry["name"]
    if len(name) > MAX_TENANT_NAME_CHARS or not name.isprintable():
        raise _invalid(
            path, f"name of tenant {name!r:.100} must be at most {MAX_TENANT_NAME_CHARS} printable characters"
        )
    if unknown := set(entry) - _KEYS:
        raise _invalid(path, f"tenant {name!r} has unknown keys {sorted(map(str, unknown))}; known: {sorted(_KEYS)}")
    key_hash = str(entry.get("key_sha256", "")).lower()
    if len(key_hash) != _SHA256_HEX_DIGITS or set(key_hash) - set("0123456789abcdef"):
        raise _invalid(path, f"key_sha256 of tenant {name!r} must be 64 hex digits")
    limits = QuotaLimits(
        max_concurrent_requests=_limit(path, entry, "max_concurrent_requests"),
        tokens_per_minute=_limit(path, entry, "tokens_per_minute"),
    )
    weight = _number(path, entry, "weight", 1.0)
    if not 0 < weight <= MAX_WEIGHT:
        raise _invalid(path, f"weight of tenant {name!r} must be more than 0 and at most {MAX_WEIGHT:.0f}")
    operator = entry.get("operator", False)
    if not isinstance(operator, bool):
        raise _invalid(path, f"operator of tenant {name!r} must be true or false")
    salt = str(entry.get("cache_salt", name)).encode()
    if len(salt) > MAX_SALT_BYTES:
        raise _invalid(path, f"cache_salt of tenant {name!r} must be at most {MAX_SALT_BYTES} bytes, got {len(salt)}")
    return key_hash, Tenant(name=name, weight=weight, limits=limits, cache_salt=salt, operator=operator)


def _limit(path: str, entry: dict[str, Any], key: str) -> int:
    value = _number(path, entry, key, 0)
    if not value.is_integer():  # a half would be cut to 0, which is no limit at all
        raise _invalid(path, f"{key} of tenant {entry['name']!r} must be a whole number, got {value!r}")
    return int(value)


def _number(path: str, entry: dict[str, Any], key: str, default: float) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_NUMBER:
        raise _invalid(
            path, f"{key} of tenant {entry['name']!r} must be a number from 0 to {_MAX_NUMBER}, got {value!r}"
        )
    return float(value)


def _invalid(path: str, problem: str) -> ConfigError:
    return ConfigError(f"tenants file {path}: {problem}", metadata={"field": "tenants_file", "value": path})
