"""Settings of the router service."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from specpool.errors import ConfigError


def _default_id() -> str:
    return f"{socket.gethostname()}-router"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """One router process."""

    id: str = field(default_factory=_default_id)
    """Stable name of this process; default: host name and role."""
    listen: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes any free one."""
    advertise: str = ""
    """Endpoint that others dial; empty for the bound one."""
    metrics_port: int | None = None
    """Port of the Prometheus endpoint; 0 takes any free one, unset is off."""
    otlp_endpoint: str = ""
    """OTLP collector for traces; empty is off."""
    trace_sampling_ratio: float = 1.0
    """Share of traces started here that are recorded; a parent's decision wins."""
    drain_grace_s: float = 30.0
    """How long a graceful stop waits for running streams."""
    log_level: str = "info"
    """debug, info, warning or error."""
    targets: tuple[str, ...] = ()
    """Endpoints of targets (static discovery)."""
    speculators: tuple[str, ...] = ()
    """Endpoints of speculators (static discovery)."""
    kubernetes_namespace: str = ""
    """Namespace whose pods are watched; set: Kubernetes discovery, and no static endpoints."""
    target_selector: str = ""
    """Label selector of target pods."""
    speculator_selector: str = ""
    """Label selector of speculator pods."""
    session_store: str = "memory://"
    """redis://..., rediss://..., unix://SOCKET or memory:// (one router only)."""
    session_ttl_s: float = 600.0
    """How long an ended or abandoned session can be resumed."""
    tenants_file: str = ""
    """YAML file of tenants by hash of their key; empty: one tenant, "default", without credentials."""
    poll_interval_s: float = 1.0
    """Time between status calls to each target and speculator."""
    failover_wait_s: float = 15.0
    """How long a stream that lost its target waits for another."""

    def __post_init__(self) -> None:
        if self.kubernetes_namespace and (self.targets or self.speculators):
            raise _invalid(
                "kubernetes_namespace", self.kubernetes_namespace, "empty when targets or speculators are set"
            )
        if self.kubernetes_namespace and not self.target_selector:
            raise _invalid("target_selector", "", "a label selector, because kubernetes_namespace is set")
        if not self.kubernetes_namespace and (self.target_selector or self.speculator_selector):
            raise _invalid("kubernetes_namespace", "", "a namespace, because a selector is set")
        for name in ("session_ttl_s", "poll_interval_s"):
            if not getattr(self, name) > 0:
                raise _invalid(name, getattr(self, name), "more than 0")


def _invalid(name: str, value: object, accepted: str) -> ConfigError:
    return ConfigError(
        f"{name} is {value!r}; accepted: {accepted}", metadata={"field": name, "value": value, "accepted": accepted}
    )
