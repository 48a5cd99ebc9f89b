"""Network addresses as text."""

from __future__ import annotations

import ipaddress
from typing import Final, NoReturn

from specpool.errors import ConfigError

_MAX_CHARS: Final = 300


def parse_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[ipv6]:port" into host and port. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) >= 65536:
        _refuse(address)
    if host.startswith("[") and host.endswith("]") and _is_ipv6(host[1:-1]):
        return host[1:-1], int(port)
    if not host or len(host) > _MAX_CHARS or not host.isprintable() or set(host) & set(":[]/ ,@"):
        _refuse(address)
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """Join host and port to what `parse_address` splits; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def channel_target(endpoint: str) -> str:
    """What gRPC dials for an endpoint: one address, or several IP addresses of one family, separated by commas."""
    addresses = [parse_address(part.strip()) for part in endpoint.split(",")]
    formatted = [format_address(*address) for address in addresses]
    if len(formatted) == 1:
        return formatted[0]
    hosts = [host for host, _ in addresses]
    if all(_is_ipv6(host) for host in hosts):
        return "ipv6:" + ",".join(formatted)
    if not all(_is_ipv4(host) for host in hosts):
        _refuse(endpoint, "HOST:PORT, or several IP addresses of one family with their ports")
    return "ipv4:" + ",".join(formatted)


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _refuse(address: str, accepted: str = "HOST:PORT or [IPV6]:PORT") -> NoReturn:
    shown = address if len(address) <= _MAX_CHARS else address[:_MAX_CHARS] + "..."
    raise ConfigError(
        f"address must be {accepted}, got {shown!r}",
        metadata={"field": "address", "value": shown, "accepted": accepted},
    )
