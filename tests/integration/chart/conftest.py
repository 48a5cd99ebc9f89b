"""The real helm on the chart, as fixtures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "specpool"

Manifest = dict[str, Any]
Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[Manifest]]


def load_module(path: Path) -> ModuleType:
    """A Python file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Runs helm with these arguments; does not check the exit status."""
    binary = load_module(ROOT / "tests" / "tools" / "fetch_helm.py").tool("helm")

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *arguments], capture_output=True, text=True, check=False, input=stdin)

    return run


@pytest.fixture(scope="session")
def template(helm: Helm) -> Helm:
    """`helm template` of the chart with values; does not check the exit status."""

    def run(values: Mapping[str, Any] | None = None, release: str = "pool", *arguments: str):  # type: ignore[no-untyped-def]
        return helm(
            "template",
            release,
            str(CHART),
            "--namespace",
            "inference",
            "--values",
            "-",
            *arguments,
            stdin=yaml.safe_dump(dict(values or {})),
        )

    return run


@pytest.fixture(scope="session")
def render(template: Helm) -> Render:
    """The manifests of the chart with values."""

    def run(values: Mapping[str, Any] | None = None, release: str = "pool") -> list[Manifest]:
        finished = template(values, release)
        assert finished.returncode == 0, finished.stderr
        return list(_documents(finished.stdout))

    return run


def _documents(text: str) -> Iterator[Manifest]:
    yield from (document for document in yaml.safe_load_all(text) if document)


if "local_services" not in sys.modules:
    load_module(ROOT / "tests" / "tools" / "local_services.py")
