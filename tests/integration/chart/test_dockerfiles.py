"""The Dockerfiles, read without building: sources exist and reach the build, users are not root, extras are right."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "specpool"
SERVICES = ("target", "speculator", "router")


def instructions(service: str) -> list[tuple[str, str]]:
    """(keyword, rest) in order, continued lines joined."""
    text = (ROOT / "docker" / f"{service}.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in lines)]


def last_stage(service: str) -> list[tuple[str, str]]:
    """Instructions after the last FROM."""
    found = instructions(service)
    return found[max(index for index, (keyword, _) in enumerate(found) if keyword == "FROM") :]


def is_ignored(service: str, path: str) -> bool:
    """Whether a top-level path is left out of the build context."""
    ignored = False
    for line in (ROOT / "docker" / f"{service}.Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            ignored = not line.startswith("!")
    return ignored


@pytest.mark.parametrize("service", SERVICES)
def test_every_source_exists_in_the_build_context(service: str) -> None:
    copies = [rest for keyword, rest in instructions(service) if keyword == "COPY" and "--from" not in rest]
    sources = [source for rest in copies for source in shlex.split(rest)[:-1]]
    assert {"pyproject.toml", "services"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not is_ignored(service, source), source
    assert is_ignored(service, ".git")


@pytest.mark.parametrize("service", SERVICES)
def test_what_the_build_needs_is_copied(service: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = [s for k, rest in instructions(service) if k == "COPY" and "--from" not in rest for s in rest.split()[:-1]]
    for path in needed:
        assert any(path == source or path.startswith(f"{source}/") for source in copied), path


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_extras_of_the_service_are_installed(service: str) -> None:
    installs = " ".join(rest for keyword, rest in instructions(service) if keyword == "RUN")
    (installed,) = re.findall(r"/source\[([^]]*)\]", installs)
    discovers = service != "speculator"  # routers find targets, targets find speculators, in the cluster
    assert installed.split(",") == [service, *(["kubernetes"] if discovers else [])]
    assert ("torch" in installs) == (service != "router")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(installed.split(",")) <= set(extras)


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_runs_the_service_as_the_chart_does(service: str, render) -> None:
    stage = last_stage(service)
    assert ("ENTRYPOINT", '["specpool"]') in stage
    assert ("CMD", f'["{service}"]') in stage
    pods = [each for each in render() if each["metadata"]["name"] == f"pool-specpool-{service}"]
    (pod,) = [each["spec"]["template"]["spec"] for each in pods if each["kind"] in ("Deployment", "StatefulSet")]
    assert pod["containers"][0]["command"] == ["specpool", service]
    context = pod["securityContext"]
    assert ("USER", f"{context['runAsUser']}:{context['runAsGroup']}") in stage
    assert [keyword for keyword, _ in stage].index("USER") < [keyword for keyword, _ in stage].index("ENTRYPOINT")


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_environment_leaves_the_build_stage(service: str) -> None:
    copies = [rest for keyword, rest in last_stage(service) if keyword == "COPY"]
    assert copies == ["--from=build /opt/specpool /opt/specpool"]
