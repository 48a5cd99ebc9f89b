"""`specpool status`: what the router knows of the processes behind it."""

from __future__ import annotations

import asyncio
import json

from rich.console import Console
from rich.table import Table

from specpool.client import Client
from specpool.v1 import router_pb2
from specpool_tools.cli.formats import status_document


async def cluster_status(endpoint: str, *, api_key: str = "") -> router_pb2.GetClusterStatusResponse:
    """Ask the router once."""
    async with Client(endpoint, api_key=api_key) as client:
        return await client.cluster_status()


def run_status(endpoint: str, *, output: str, api_key: str = "") -> None:
    """Print the status as JSON or as tables."""
    status = asyncio.run(cluster_status(endpoint, api_key=api_key))
    document = status_document(status)
    if output == "json":
        print(json.dumps(document))
        return
    console = Console() if Console().is_terminal else Console(width=180)
    router = document["router"]
    store = f"{document['session_store']} ({'up' if document['session_store_reachable'] else 'DOWN'})"
    console.print(f"router {router['id']} at {endpoint}: {router['state']}, session store {store}")
    table = Table(
        "role", "id", "incarnation", "endpoint", "state", "model", "running", "free KV", "cached", "linked to", box=None
    )
    for role, entries, links in (("target", "targets", "speculators"), ("speculator", "speculators", "targets")):
        for entry in document[entries]:
            table.add_row(*_row(role, entry, links))
    console.print(table)


def _row(role: str, entry: dict, links: str) -> list[str]:  # type: ignore[type-arg]
    if not entry["reachable"]:
        return [role, entry["id"], "", entry["endpoint"], f"unreachable: {entry['error']}", "", "", "", "", ""]
    model, load = entry["model"], entry["load"]
    peers = [_link(link) for link in entry[links]]
    return [
        role,
        entry["id"],
        entry["incarnation"][:8],
        entry["endpoint"],
        entry["state"],
        f"{model['name']} {model['dtype']} {model['attention_backend']} {model['device']}",
        f"{load['sequences_running']} (+{load['sequences_waiting']})",
        f"{load['free_kv_blocks']}/{load['kv_blocks']}",
        _hit_rate(load["prefix_cache_hit_tokens"], load["prefix_cache_queried_tokens"]),
        ", ".join(peers),
    ]


def _hit_rate(num_hits: int, num_queried: int) -> str:
    """Share of the tokens of all sequences that the prefix cache had when they came."""
    return f"{num_hits / num_queried:.0%}" if num_queried else ""


def _link(link: dict) -> str:  # type: ignore[type-arg]
    if "connected" not in link:
        return str(link["id"])
    state = f"via {link['transport']}" if link["connected"] else f"DOWN: {link['last_error']}"
    if link["connected"] and link.get("group_error"):
        state += f" (no {link['agreed_transport']}: {link['group_error']})"
    return f"{link['speculator']['id'] or link['endpoint']} {state}"
