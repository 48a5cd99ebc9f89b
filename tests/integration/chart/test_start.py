"""The rendered commands and environment of every container start the real services, as a kubelet would start them.

Only what a node provides is stood in for: pod fields, mounted folders, DNS, a Kubernetes API with the pods, a Redis.
Models are toys, set by values like any other.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import yaml

from specpool_tools.local.embedded_store import find_binary

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "specpool"
NAMESPACE = "inference"
FIELDS = {
    "status.podIP": "127.0.0.1",
    "metadata.namespace": NAMESPACE,
    "spec.nodeName": "node-1",
    "metadata.labels['topology.kubernetes.io/zone']": "",
}
API_KEY = "a test key"


@pytest.fixture(scope="module")
def services() -> ModuleType:
    return sys.modules["local_services"]


@pytest.fixture
def redis_port(services: ModuleType, tmp_path: Path) -> Iterator[int]:
    port = services.free_port()
    command = [str(find_binary()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with services.service(command, {}, tmp_path / "redis.log"):
        yield port


class Pod:
    """What a kubelet and the API server know of one rendered pod."""

    def __init__(self, component: str, template: dict[str, Any], folder: Path) -> None:
        self.name = f"{component}-0"
        self.labels = template["metadata"]["labels"]
        self.spec = template["spec"]
        (self.container,) = template["spec"]["containers"]
        self.mounts: dict[str, Path] = {}
        for mount in self.container.get("volumeMounts", []):
            self.mounts[mount["mountPath"]] = folder / self.name / mount["name"]
            self.mounts[mount["mountPath"]].mkdir(parents=True)

    @property
    def command(self) -> list[str]:
        return [*self.container["command"], *self.container.get("args", [])]

    def port(self, name: str) -> int:
        return int(next(each["containerPort"] for each in self.container["ports"] if each["name"] == name))

    def environment(self) -> dict[str, str]:
        """Fields resolved, `$(VARIABLE)` expanded, paths moved to where the volumes are here."""
        resolved: dict[str, str] = {}
        fields = FIELDS | {"metadata.name": self.name}
        for variable in self.container["env"]:
            if "value" in variable:
                value = variable["value"]
                for name, known in resolved.items():
                    value = value.replace(f"$({name})", known)
            else:
                value = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            for path, folder in self.mounts.items():
                if value.startswith(path):
                    value = str(folder) + value.removeprefix(path)
            resolved[variable["name"]] = value
        return resolved

    def manifest(self) -> dict[str, Any]:
        """As the API server shows it once the readiness probe has passed."""
        return {
            "metadata": {"name": self.name, "uid": self.name, "labels": self.labels, "resourceVersion": "1"},
            "spec": self.spec,
            "status": {"podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
        }


@contextmanager
def kubernetes_api(pods: list[Pod]) -> Iterator[str]:
    """Serves these pods by label; watches stay silent."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlparse(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            assert url.path == f"/api/v1/namespaces/{NAMESPACE}/pods", url.path
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if "watch" in query:
                ended.wait(60)
                return
            wanted = dict(part.split("=") for part in query["labelSelector"].split(","))
            items = [pod.manifest() for pod in pods if wanted.items() <= pod.labels.items()]
            self.wfile.write(json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()


def kubeconfig(url: str, path: Path) -> Path:
    """In place of the service account that is mounted into a real pod."""
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": url}}],
                "users": [{"name": "test", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            }
        )
    )
    return path


def test_rendered_containers_start_and_serve_a_token(
    render, services: ModuleType, redis_port: int, tmp_path: Path
) -> None:
    manifests: list[dict[str, Any]] = []
    pods: dict[str, Pod] = {}
    for component in ("target", "speculator", "router"):  # one render each: here they share one network namespace
        manifests = render(_values(services.free_port(), services.free_port(), redis_port))
        template = next(
            each["spec"]["template"]
            for each in manifests
            if each["kind"] in ("Deployment", "StatefulSet")
            and each["metadata"]["name"] == f"pool-specpool-{component}"
        )
        pods[component] = Pod(component, template, tmp_path)
    secret = next(each for each in manifests if each["kind"] == "Secret")
    (pods["router"].mounts["/etc/specpool"] / "tenants.yaml").write_text(secret["stringData"]["tenants.yaml"])

    with ExitStack() as stack:
        api = stack.enter_context(kubernetes_api([pods["target"], pods["speculator"]]))
        running = {}
        for component, pod in pods.items():
            environment = pod.environment() | {"KUBECONFIG": str(kubeconfig(api, tmp_path / "kubeconfig"))}
            log = tmp_path / f"{component}.log"
            running[component] = stack.enter_context(services.service(pod.command, environment, log))
        for component, pod in pods.items():
            running[component].wait_until_serving(**pod.container["readinessProbe"]["grpc"])

        answer = _helm_test(services, manifests, pods["router"])
        assert len(answer["token_ids"]) == 1

        named = yaml.safe_load((CHART / "files" / "metrics.yaml").read_text())
        for component, pod in pods.items():
            page = services.scrape(pod.port("metrics"))
            declared = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")}
            for name in named[component]:
                assert {name, name.removesuffix("_total")} & declared, f"{name} of the {component}"
        for component in ("router", "target", "speculator"):
            assert running[component].stop() == 0, running[component].log.read_text()


def _helm_test(services: ModuleType, manifests: list[dict[str, Any]], router: Pod) -> Any:
    """Run what the test pod of `helm test` runs, with the router's Service name resolved."""
    (test_pod,) = [each for each in manifests if each["kind"] == "Pod"]
    (container,) = test_pod["spec"]["containers"]
    command = [services.SPECPOOL, *container["command"][1:], *container["args"]]
    command = [f"--endpoint=127.0.0.1:{router.port('grpc')}" if "--endpoint" in each else each for each in command]
    (key,) = container["env"]
    assert key["valueFrom"] == {"secretKeyRef": {"name": "test-key", "key": "api-key"}}
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", key["name"]: API_KEY}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def _values(grpc_port: int, metrics_port: int, redis_port: int) -> dict[str, Any]:
    toy = {"device": "cpu", "dtype": "float32", "gpu": {"count": 0}}
    return {
        "target": toy | {"model": "toy#vocab=64,seed=1"},
        "speculator": toy | {"model": "toy#vocab=64,seed=1,agreement=0.8"},
        "redis": {"enabled": False, "external": {"url": f"redis://127.0.0.1:{redis_port}/0"}},
        "grpcPort": grpc_port,
        "telemetry": {"metricsPort": metrics_port},
        "tenants": {"inline": [{"name": "acme", "key_sha256": hashlib.sha256(API_KEY.encode()).hexdigest()}]},
        "helmTest": {"apiKeySecret": "test-key"},
        "drain": {"graceSeconds": 5},
    }
