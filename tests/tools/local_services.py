"""Service processes for tests: started with a command and an environment, asked for their health, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SPECPOOL = str(Path(sys.executable).with_name("specpool"))
_START_S = 90.0


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """One running process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        inherited = {key: os.environ[key] for key in ("PATH", "LANG", "PYTHONPATH") if key in os.environ}
        self.environment = inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(environment)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [SPECPOOL if command[0] == "specpool" else command[0], *command[1:]],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_serving(self, port: int, service: str = "") -> None:
        """Ask the standard health service as the kubelet does, until it says SERVING."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"exited with {self.process.returncode}:\n{self.log.read_text()}")
            if health_of(port, service) == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.1)
        raise AssertionError(f"not serving after {_START_S} s:\n{self.log.read_text()}")

    def stop(self) -> int:
        """SIGTERM, then the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not stop on SIGTERM:\n{self.log.read_text()}") from None


@contextmanager
def service(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Service]:
    """A process that is gone afterwards."""
    running = Service(command, environment, log)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def health_of(port: int, service: str = "") -> int:
    """Status of a service, or of the whole server, at a loopback port; UNKNOWN when it does not answer."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=2
            )
        except grpc.RpcError:
            return int(health_pb2.HealthCheckResponse.UNKNOWN)
        return int(answer.status)


def scrape(port: int) -> str:
    """What Prometheus would get."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())
