"""Network addresses as text."""

from __future__ import annotations

from specpool.errors import ConfigError


def parse_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[ipv6]:port"."""
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    valid = separator and host and port.isascii() and port.isdigit() and int(port) < 65536
    if not valid or (":" in host and not bracketed):
        raise ConfigError(
            f"address must be HOST:PORT or [IPV6]:PORT, got {address!r}",
            metadata={"field": "address", "value": address, "accepted": "HOST:PORT or [IPV6]:PORT"},
        )
    return (host[1:-1] if bracketed else host), int(port)


def format_address(host: str, port: int) -> str:
    """Inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
