"""An OTLP receiver and the three real services on toy models, as processes."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


def _tool(name: str) -> ModuleType:
    """A helper module by path: under --import-mode=importlib a folder of tests is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


local_services, slow_network = _tool("local_services"), _tool("slow_network")


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span it gets, with the name of its service."""

    spans: list[tuple[str, trace_pb2.Span]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans.extend((attributes["service.name"], span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass(frozen=True)
class Stack:
    """What runs."""

    router_endpoint: str
    metrics_ports: dict[str, int]
    receiver: Receiver
    processes: dict[str, local_services.Service]

    def stop(self) -> None:
        """SIGTERM all, router first; on the way out they export the spans they hold."""
        for role in ("router", "target", "speculator"):
            self.processes[role].stop()


@dataclass(frozen=True)
class Timing:
    """How slow things are; a test asks for other values with `parametrize("stack", [{...}], indirect=True)`."""

    step_ms: int = 20
    """Of the target. Slow enough for tables to arrive in time."""
    network_s: float = 0.0
    """One way between target and speculator."""


@pytest.fixture
def stack(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    timing = Timing(**getattr(request, "param", {}))
    receiver = Receiver()
    collector = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, collector)
    collector_port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    grpc_ports = {role: local_services.free_port() for role in ("speculator", "target", "router")}
    metrics_ports = {role: local_services.free_port() for role in grpc_ports}
    own = {
        "target": {"MODEL": f"toy#vocab=64,seed=1,step_ms={timing.step_ms}"},
        "speculator": {"MODEL": "toy#vocab=64,seed=1,agreement=0.8"},
        "router": {
            "TARGETS": f"127.0.0.1:{grpc_ports['target']}",
        },
    }
    processes = {}
    with ExitStack() as running:
        reached = running.enter_context(slow_network.delayed(grpc_ports["speculator"], timing.network_s))
        own["router"]["SPECULATORS"] = f"127.0.0.1:{reached}"
        for role, port in grpc_ports.items():
            settings = own[role] | {
                "LISTEN": f"127.0.0.1:{port}",
                "METRICS_PORT": str(metrics_ports[role]),
                "OTLP_ENDPOINT": f"http://127.0.0.1:{collector_port}",
                "TRACE_SAMPLING_RATIO": "1.0",
                "DRAIN_GRACE_S": "2",
            }
            environment = {f"SPECPOOL_{role.upper()}_{name}": value for name, value in settings.items()}
            environment |= {"HOME": str(tmp_path), "SPECPOOL_CACHE": str(tmp_path)}
            log = tmp_path / f"{role}.log"
            processes[role] = running.enter_context(local_services.service(["specpool", role], environment, log))
        for role, port in grpc_ports.items():
            processes[role].wait_until_serving(port)
        yield Stack(f"127.0.0.1:{grpc_ports['router']}", metrics_ports, receiver, processes)
    collector.stop(None)
