"""Discovery against a small API server over real HTTP: list, watch, 410 Gone."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from kubernetes import client

from specpool.discovery.discovery import Endpoint
from specpool.discovery.kubernetes import KubernetesDiscovery


class FakeApi:
    """Pods of one namespace; events are sent to whoever watches."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.version = 1
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.lists: list[str] = []
        self.watch_versions: list[str] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlparse(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                assert url.path == "/api/v1/namespaces/ns/pods"
                if query.get("watch") in ("true", "True", "1"):
                    api.watch_versions.append(query["resourceVersion"])
                    self._watch()
                else:
                    api.lists.append(query["labelSelector"])
                    self._list()

            def _list(self) -> None:
                body = json.dumps(
                    {
                        "kind": "PodList",
                        "apiVersion": "v1",
                        "metadata": {"resourceVersion": str(api.version)},
                        "items": list(api.pods.values()),
                    }
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _watch(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while (event := api.events.get()) is not None:
                    line = json.dumps(event).encode() + b"\n"
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, kind: str, pod: dict[str, Any]) -> None:
        self.version += 1
        pod["metadata"]["resourceVersion"] = str(self.version)
        self.pods[pod["metadata"]["uid"]] = pod
        if kind == "DELETED":
            del self.pods[pod["metadata"]["uid"]]
        self.events.put({"type": kind, "object": pod})

    def gone(self) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "code": 410, "reason": "Expired", "message": "too old"}
        self.events.put({"type": "ERROR", "object": status})
        self.events.put(None)


def pod(
    uid: str,
    ip: str,
    *,
    ready: bool = True,
    containers_ready: bool | None = None,
    terminating: bool = False,
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    node: str = "",
) -> dict[str, Any]:
    deletion = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if terminating else {}
    conditions = {"Ready": ready, "ContainersReady": ready if containers_ready is None else containers_ready}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": uid, "uid": uid, "annotations": annotations or {}, "labels": labels or {}, **deletion},
        "spec": {
            "nodeName": node or None,
            "containers": [
                {
                    "name": "c",
                    "ports": [{"name": "metrics", "containerPort": 9}, {"name": "grpc", "containerPort": 50051}],
                }
            ],
        },
        "status": {
            "podIP": ip,
            "conditions": [{"type": name, "status": str(is_true)} for name, is_true in conditions.items()],
        },
    }


@pytest.fixture
def api() -> Iterator[FakeApi]:
    fake = FakeApi()
    yield fake
    fake.events.put(None)
    fake.server.shutdown()
    fake.server.server_close()


def discovery(api: FakeApi) -> KubernetesDiscovery:
    """Of the fake, whose pods so far are found by its first list."""
    while not api.events.empty():
        api.events.get()
    host = f"http://127.0.0.1:{api.server.server_port}"
    return KubernetesDiscovery("ns", "app=target", api_client=client.ApiClient(client.Configuration(host=host)))


async def becomes(found: KubernetesDiscovery, *wanted: Endpoint) -> None:
    async with asyncio.timeout(30):
        while found.endpoints != set(wanted):
            await asyncio.sleep(0.01)


async def test_follows_ready_pods_and_survives_410(api: FakeApi) -> None:
    api.put("ADDED", pod("a", "10.0.0.1"))
    api.put("ADDED", pod("b", "10.0.0.2", ready=False))
    found = discovery(api)
    changes: list[frozenset[Endpoint]] = []
    found.on_change(changes.append)
    await found.start()
    try:
        await becomes(found, Endpoint("10.0.0.1:50051", "a"))
        api.put("MODIFIED", pod("b", "10.0.0.2", annotations={"specpool.io/port": "777"}))
        await becomes(found, Endpoint("10.0.0.1:50051", "a"), Endpoint("10.0.0.2:777", "b"))
        api.put("MODIFIED", pod("a", "10.0.0.1", ready=False))
        await becomes(found, Endpoint("10.0.0.2:777", "b"))
        # While the watch is away a pod is replaced under the same address: another uid is another pod.
        del api.pods["b"]
        api.pods["c"] = pod("c", "10.0.0.2")
        api.version = 50
        api.gone()
        await becomes(found, Endpoint("10.0.0.2:50051", "c"))
        api.put("DELETED", pod("c", "10.0.0.2"))
        await becomes(found)
        assert set(api.lists) == {"app=target"}
        assert len(api.lists) == 2
        assert api.watch_versions[-1] == "50"
        assert changes[-1] == frozenset()
    finally:
        await found.close()


async def test_a_terminating_pod_stays_while_it_serves(api: FakeApi) -> None:
    api.put("ADDED", pod("a", "10.0.0.1"))
    found = discovery(api)
    await found.start()
    try:
        await becomes(found, Endpoint("10.0.0.1:50051", "a"))
        api.put("MODIFIED", pod("a", "10.0.0.1", terminating=True))
        await becomes(found, Endpoint("10.0.0.1:50051", "a", terminating=True))
        # A pod that comes up at the same address while the old one is still listed has it.
        api.put("ADDED", pod("b", "10.0.0.1"))
        await becomes(found, Endpoint("10.0.0.1:50051", "b"))
        api.put("DELETED", pod("b", "10.0.0.1"))
        await becomes(found, Endpoint("10.0.0.1:50051", "a", terminating=True))
        # Its readiness probe fails: it is done.
        api.put("MODIFIED", pod("a", "10.0.0.1", terminating=True, ready=False))
        await becomes(found)
    finally:
        await found.close()


async def test_a_pod_whose_node_is_out_of_reach_is_listed_as_not_ready(api: FakeApi) -> None:
    """The node controller takes Ready away; what the node last said of the containers stays."""
    api.put("ADDED", pod("a", "10.0.0.1"))
    found = discovery(api)
    await found.start()
    try:
        api.put("MODIFIED", pod("a", "10.0.0.1", ready=False, containers_ready=True))
        await becomes(found, Endpoint("10.0.0.1:50051", "a", ready=False))
    finally:
        await found.close()


async def test_says_where_a_pod_runs(api: FakeApi) -> None:
    labels = {"topology.kubernetes.io/zone": "z1", "specpool.io/rack": "r7", "app": "target"}
    api.put("ADDED", pod("a", "10.0.0.1", labels=labels, node="n3"))
    found = discovery(api)
    await found.start()
    try:
        await becomes(found, Endpoint("10.0.0.1:50051", "a", labels={"node": "n3", "zone": "z1", "rack": "r7"}))
    finally:
        await found.close()
