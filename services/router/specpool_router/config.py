"""Settings of the router service."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from specpool.config import ServiceSettings, invalid


class RouterConfig(ServiceSettings):
    """One router process."""

    role: ClassVar = "router"

    targets: tuple[str, ...] = ()
    """Endpoints of targets, or one `dns:NAME:PORT`: all addresses of that name."""
    speculators: tuple[str, ...] = ()
    """Endpoints of speculators, or one `dns:NAME:PORT`: all addresses of that name."""
    kubernetes_namespace: str = ""
    """Namespace whose pods are watched; set: Kubernetes discovery, and no other endpoints."""
    target_selector: str = ""
    """Label selector of target pods."""
    speculator_selector: str = ""
    """Label selector of speculator pods."""
    session_store: str = "memory://"
    """redis://..., rediss://..., unix://SOCKET or memory:// (one router only)."""
    session_ttl_s: PositiveFloat = 600.0
    """How long an ended or abandoned session can be resumed."""
    max_request_bytes: int = Field(default=2 << 20, ge=1 << 10, le=32 << 20)
    """Largest request, about four bytes per token of text; it is kept in the session store until it has ended."""
    tenants_file: str = ""
    """YAML file of tenants by hash of their key; empty: one tenant, "default", without credentials."""
    poll_interval_s: PositiveFloat = 1.0
    """Time between status calls to each target and speculator."""
    failover_wait_s: NonNegativeFloat = 15.0
    """How long a stream that lost its target waits for another."""
    request_wait_s: NonNegativeFloat = 15.0
    """How long a new request waits where no target is available."""
    progress_timeout_s: PositiveFloat = 120.0
    """A stream moves to another target when its target shows no sign of life for this long."""

    @model_validator(mode="after")
    def _check_discovery(self) -> Self:
        if self.kubernetes_namespace and (self.targets or self.speculators):
            raise invalid(
                "kubernetes_namespace", self.kubernetes_namespace, "empty when targets or speculators are set"
            )
        if self.kubernetes_namespace and not self.target_selector:
            raise invalid("target_selector", "", "a label selector, because kubernetes_namespace is set")
        if not self.kubernetes_namespace and (self.target_selector or self.speculator_selector):
            raise invalid("kubernetes_namespace", "", "a namespace, because a selector is set")
        return self
