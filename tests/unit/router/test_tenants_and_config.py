"""Tenants file and settings."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from specpool.discovery.discovery import StaticDiscovery
from specpool.discovery.dns import DnsDiscovery
from specpool.errors import ConfigError, Unauthenticated
from specpool_router.auth.tenants import load_tenants
from specpool_router.config import RouterConfig
from specpool_router.server import make_discoveries

HASH = hashlib.sha256(b"key").hexdigest()


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    return load_tenants(str(path))


def test_everybody_is_default_without_a_file() -> None:
    assert load_tenants("").authenticate([]).name == "default"


def test_key_finds_its_tenant(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: acme, key_sha256: {HASH}, weight: 2, tokens_per_minute: 5}}]")
    tenants = load_tenants(str(path))
    tenant = tenants.authenticate([("x", "y"), ("authorization", "bearer key")])
    assert (tenant.name, tenant.weight, tenant.limits.tokens_per_minute, tenant.operator) == ("acme", 2.0, 5, False)
    for metadata in (
        [],
        [("authorization", "key")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {HASH}")],
    ):
        with pytest.raises(Unauthenticated):
            tenants.authenticate(metadata)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "one key, 'tenants'"),
        ("tenants: [{name: a}]", "64 hex digits"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, quota: 1}}]", "unknown keys"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, weight: -1}}]", "from 0 to"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, weight: .nan}}]", "from 0 to"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, weight: 1.0e+39}}]", "from 0 to"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, weight: 1.0e+9}}]", "at most 1000000"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, tokens_per_minute: 1.0e+300}}]", "from 0 to"),
        (f"tenants: [{{name: a, key_sha256: {HASH}}}, {{name: b, key_sha256: {HASH}}}]", "two tenants"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, max_concurrent_requests: 0.5}}]", "must be a whole number"),
        (f"tenants: [{{name: {'a' * 129}, key_sha256: {HASH}}}]", "at most 128 printable characters"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, cache_salt: {'a' * 1025}}}]", "at most 1024 bytes, got 1025"),
        ("tenants: [", "cannot be read"),
        ("tenants: 2024-99-99", "cannot be read"),
        (f"tenants: [{{name: a, key_sha256: {HASH}, quota: 1, 2: 3}}]", "unknown keys"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, text)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_bytes(b"tenants: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tenants(str(path))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kubernetes_namespace": "n", "target_selector": "a=b", "targets": ("x:1",)}, "kubernetes_namespace"),
        ({"kubernetes_namespace": "n"}, "target_selector"),
        ({"target_selector": "a=b"}, "kubernetes_namespace"),
        ({"session_ttl_s": 0.0}, "session_ttl_s"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(**settings)  # type: ignore[arg-type]
    assert caught.value.metadata["field"] == field


def test_endpoints_are_a_list_or_a_name() -> None:
    targets, speculators = make_discoveries(RouterConfig(targets=("a:1", "b:2"), speculators=("dns:pool:7",)))
    assert isinstance(targets, StaticDiscovery)
    assert isinstance(speculators, DnsDiscovery)
    nothing, _ = make_discoveries(RouterConfig())
    assert isinstance(nothing, StaticDiscovery)
    with pytest.raises(ConfigError, match="address must be HOST:PORT"):
        make_discoveries(RouterConfig(targets=("a:1", "dns:b:2:3")))
