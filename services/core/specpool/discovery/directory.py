"""Directories by their text form, as settings name them.

==============================  ===============================================================
``static:HOST:PORT,...``        exactly these
``dns:NAME:PORT``               all addresses of a name, for instance of a headless service
``kubernetes:NAMESPACE/LABELS`` the pods with these labels, for instance ``ns/app=speculator``
``router``                      what routers tell
==============================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from specpool.addresses import parse_address
from specpool.discovery.discovery import NODE, RACK, REGION, ZONE, Discovery, StaticDiscovery
from specpool.discovery.dns import DnsDiscovery
from specpool.discovery.told import ToldDiscovery
from specpool.errors import ConfigError

LABELS: Final = (NODE, ZONE, REGION, RACK)
_ACCEPTED: Final = "static:HOST:PORT,..., dns:NAME:PORT, kubernetes:NAMESPACE/LABELS or router"


def parse(text: str, *, field: str = "directory") -> Discovery:
    """The directory that ``text`` names. Raises ConfigError, which names the setting ``field``."""
    kind, _, rest = text.partition(":")
    if text == "router":
        return ToldDiscovery()
    if kind == "static" and rest:
        addresses = [address.strip() for address in rest.split(",")]
        for address in addresses:
            parse_address(address)
        return StaticDiscovery(addresses)
    if kind == "dns" and rest:
        return DnsDiscovery(*parse_address(rest))
    if kind == "kubernetes":
        namespace, _, selector = rest.partition("/")
        if namespace and selector:
            from specpool.discovery.kubernetes import KubernetesDiscovery

            return KubernetesDiscovery(namespace, selector)
    raise ConfigError(
        f"{field} is {text!r}; accepted: {_ACCEPTED}", metadata={"field": field, "value": text, "accepted": _ACCEPTED}
    )


def parse_labels(entries: Iterable[str], *, field: str = "labels") -> dict[str, str]:
    """Where a process says that it runs, by `node=NAME` and the like; names that are empty are left out."""
    found: dict[str, str] = {}
    for entry in entries:
        label, separator, name = entry.partition("=")
        if not separator or label not in LABELS:
            accepted = ", ".join(f"{each}=NAME" for each in LABELS)
            raise ConfigError(
                f"{field} has {entry!r}; accepted: {accepted}",
                metadata={"field": field, "value": entry, "accepted": accepted},
            )
        if name:
            found[label] = name
    return found
