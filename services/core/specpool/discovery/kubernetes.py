"""Finds pods that serve by label through the Kubernetes API: list, then watch, and list again when it is too old.

The client library blocks, so a thread runs it and hands every change to the event loop. When the API server cannot be
reached the last known pods stay: their own status calls tell whether they are there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from specpool.addresses import format_address
from specpool.backoff import Backoff
from specpool.discovery.discovery import NODE, RACK, REGION, ZONE, Endpoint, ThreadedDiscovery
from specpool.errors import ConfigError

_logger = logging.getLogger(__name__)

PORT_ANNOTATION: Final = "specpool.io/port"
PORT_NAME: Final = "grpc"
LABELS: Final = {
    ZONE: "topology.kubernetes.io/zone",
    REGION: "topology.kubernetes.io/region",
    RACK: "specpool.io/rack",
}
"""Labels of a pod that say where it runs; newer clusters copy the first two from its node."""
_WATCH_S: Final = 300
_FIRST_BACKOFF_S: Final = 0.2
_LONGEST_BACKOFF_S: Final = 10.0
_GONE: Final = 410


class KubernetesDiscovery(ThreadedDiscovery):
    """Pods of one namespace and label selector, from ready to gone."""

    def __init__(self, namespace: str, selector: str, *, api_client: Any = None) -> None:
        super().__init__()
        self._namespace = namespace
        self._selector = selector
        self._api_client = api_client
        self._pods: dict[str, Endpoint | None] = {}
        self._watch: Any = None

    async def start(self) -> None:
        """Start the thread."""
        if self._api_client is None:
            self._api_client = await asyncio.to_thread(_default_api_client)
        await super().start()

    async def close(self) -> None:
        """Ask the thread to stop."""
        await super().close()
        if self._watch is not None:
            self._watch.stop()

    def _run(self) -> None:
        from kubernetes import client

        api = client.CoreV1Api(self._api_client)
        backoff = Backoff(first_s=_FIRST_BACKOFF_S, longest_s=_LONGEST_BACKOFF_S)
        while not self._stopping.is_set():
            try:
                version = self._list(api)
                backoff.reset()
                self._follow(api, version)
            except client.ApiException as error:
                if error.status == _GONE:  # the watch is older than the server's memory: list again, soon
                    self._stopping.wait(_FIRST_BACKOFF_S)
                    continue
                self._pause(error, backoff.next_s())
            except Exception as error:  # whatever the HTTP library raises; the watch must never end
                self._pause(error, backoff.next_s())

    def _pause(self, error: Exception, pause_s: float) -> None:
        if not self._stopping.is_set():
            _logger.warning("watching pods %r in %s failed: %s", self._selector, self._namespace, error)
            self._stopping.wait(pause_s)

    def _list(self, api: Any) -> str:
        pods = api.list_namespaced_pod(self._namespace, label_selector=self._selector, _request_timeout=10)
        self._pods = {pod.metadata.uid: endpoint_of(pod) for pod in pods.items}
        self._tell()
        version: str = pods.metadata.resource_version
        return version

    def _follow(self, api: Any, version: str) -> None:
        """Take in changes until the server ends the watch; it may be resumed from where it ended."""
        from kubernetes import watch

        while not self._stopping.is_set():
            self._watch = watch.Watch()
            stream = self._watch.stream(
                api.list_namespaced_pod,
                self._namespace,
                label_selector=self._selector,
                resource_version=version,
                timeout_seconds=_WATCH_S,
                _request_timeout=_WATCH_S + 10,
            )
            num_events = 0
            for event in stream:
                num_events += 1
                self._apply(event["type"], event["object"])
                version = event["object"].metadata.resource_version
            if num_events == 0:
                self._stopping.wait(_FIRST_BACKOFF_S)  # a server that ends watches at once is not hammered

    def _apply(self, kind: str, pod: Any) -> None:
        if kind == "DELETED":
            self._pods.pop(pod.metadata.uid, None)
        elif kind in ("ADDED", "MODIFIED"):
            self._pods[pod.metadata.uid] = endpoint_of(pod)
        self._tell()

    def _tell(self) -> None:
        found = sorted((e for e in self._pods.values() if e), key=lambda endpoint: not endpoint.terminating)
        self._hand_over({endpoint.address: endpoint for endpoint in found}.values())  # whoever stays has the address


def endpoint_of(pod: Any) -> Endpoint | None:
    """Where a pod listens; None unless it serves.

    A pod that is being deleted serves until it is no longer ready. One whose node is out of reach is said not to be
    ready by the node controller, which leaves what the node last said of its containers: it may well serve.
    """
    true = {condition.type for condition in pod.status.conditions or () if condition.status == "True"}
    terminating = pod.metadata.deletion_timestamp is not None
    serves = "Ready" in true or ("ContainersReady" in true and not terminating)
    port = _port_of(pod)
    if not serves or not pod.status.pod_ip or port is None:
        return None
    return Endpoint(
        format_address(pod.status.pod_ip, port),
        pod.metadata.uid,
        labels=_labels_of(pod),
        terminating=terminating,
        ready="Ready" in true,
    )


def _labels_of(pod: Any) -> dict[str, str]:
    own = pod.metadata.labels or {}
    found = {label: own[name] for label, name in LABELS.items() if own.get(name)}
    return {NODE: pod.spec.node_name, **found} if pod.spec.node_name else found


def _port_of(pod: Any) -> int | None:
    annotation = (pod.metadata.annotations or {}).get(PORT_ANNOTATION, "")
    if annotation.isascii() and annotation.isdigit():
        return int(annotation)
    ports = [port for container in pod.spec.containers for port in container.ports or ()]
    return next((port.container_port for port in ports if port.name == PORT_NAME), None)


def _default_api_client() -> Any:
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ConfigError(
            "pods are to be watched, but the package kubernetes is not installed: pip install 'specpool[kubernetes]'",
            reason="MISSING_EXTRA",
            metadata={"field": "kubernetes_namespace"},
        ) from error
    try:
        config.load_config()
    except config.ConfigException as error:
        raise ConfigError(
            f"pods are to be watched, but there is neither a service account nor a kubeconfig: {error}",
            metadata={"field": "kubernetes_namespace"},
        ) from error
    return client.ApiClient()
