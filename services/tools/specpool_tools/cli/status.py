"""`specpool status`: what the router knows of the processes behind it."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from specpool.client import Client
from specpool.v1 import router_pb2
from specpool_tools.cli.formats import status_document


async def cluster_status(endpoint: str, *, api_key: str = "") -> router_pb2.GetClusterStatusResponse:
    """Ask the router once."""
    async with Client(endpoint, api_key=api_key) as client:
        return await client.cluster_status()


def run_status(endpoint: str, *, output: str, api_key: str = "") -> None:
    """Print the status as JSON or in lines."""
    status = asyncio.run(cluster_status(endpoint, api_key=api_key))
    document = status_document(status)
    if output == "json":
        print(json.dumps(document))
        return
    router = document["router"]
    store = f"{document['session_store']} ({'up' if document['session_store_reachable'] else 'DOWN'})"
    print(f"router {router['id']} at {endpoint}: {router['state']}, session store {store}")
    for role, entries, links in (("target", "targets", "speculators"), ("speculator", "speculators", "targets")):
        for entry in document[entries]:
            for line in describe(role, entry, links):
                print(line)


def describe(role: str, entry: dict[str, Any], links: str) -> Iterator[str]:
    """Lines of at most 80 characters on one pod: who and where, its model, its load, and the pods that it has."""
    if not entry["reachable"]:
        yield from _wrapped(f"{role} {entry['id']} at {entry['endpoint']}: UNREACHABLE", indent=0)
        yield from _wrapped(entry["error"])
        return
    who = f"{role} {entry['id']} at {entry['endpoint']}: {entry['state']}, incarnation {entry['incarnation'][:8]}"
    yield from _wrapped(who, indent=0)
    model, load = entry["model"], entry["load"]
    parts = (model["name"], model["dtype"], model["weights"], model["attention_backend"], model["device"])
    yield from _wrapped(f"model {' '.join(part for part in parts if part)}")
    running = f"running {load['sequences_running']} (+{load['sequences_waiting']} waiting)"
    cached = _hit_rate(load["prefix_cache_hit_tokens"], load["prefix_cache_queried_tokens"])
    blocks = f"KV blocks free {load['free_kv_blocks']} of {load['kv_blocks']}"
    yield from _wrapped(f"{running}, {blocks}" + (f", prompts cached {cached}" if cached else ""))
    for link in entry[links]:
        yield from _wrapped(f"linked to {_link(link)}")


def _wrapped(line: str, *, indent: int = 2) -> list[str]:
    """The line in pieces; what follows the first is indented further."""
    return textwrap.wrap(line, 80, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))


def _hit_rate(num_hits: int, num_queried: int) -> str:
    """Share of the tokens of all sequences that the prefix cache had when they came."""
    return f"{num_hits / num_queried:.0%}" if num_queried else ""


def _link(link: dict[str, Any]) -> str:
    if "connected" not in link:
        return str(link["id"])
    state = f"via {link['transport']}" if link["connected"] else f"DOWN: {link['last_error']}"
    if link["connected"] and link.get("group_error"):
        state += f" (no {link['agreed_transport']}: {link['group_error']})"
    return f"{link['speculator']['id'] or link['endpoint']} {state}"
