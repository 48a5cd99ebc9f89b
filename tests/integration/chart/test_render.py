"""What the chart renders: accepted by helm and by Kubernetes, and placed, named and stopped as documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from specpool.errors import Unauthenticated
from specpool.shutdown import EXIT_S
from specpool_router.auth.tenants import load_tenants

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "specpool"
KUBERNETES_VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
VALUE_SETS = [{}, *(yaml.safe_load(path.read_text()) for path in CI_VALUES)]
VALUE_IDS = ["default", *(path.name.removesuffix("-values.yaml") for path in CI_VALUES)]
OUR_COMPONENTS = ("target", "speculator", "router")

value_sets = pytest.mark.parametrize("values", VALUE_SETS, ids=VALUE_IDS)


def find(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one manifest of this kind and name."""
    found = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) == 1, [(each["kind"], each["metadata"]["name"]) for each in manifests]
    return found[0]


def workloads(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod spec by component."""
    return {
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]["spec"]
        for each in manifests
        if each["kind"] in ("Deployment", "StatefulSet")
    }


@pytest.mark.parametrize("path", [None, *CI_VALUES], ids=VALUE_IDS)
def test_lint_strict(helm, path: Path | None) -> None:
    finished = helm("lint", "--strict", str(CHART), *(["--values", str(path)] if path else []))
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@value_sets
def test_every_manifest_fits_the_kubernetes_schema(render, values: dict[str, Any], version: str) -> None:
    checked = [each for each in render(values) if each["kind"] != "PodMonitor"]  # a custom resource
    assert len(checked) >= 13
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_check_can_fail(render) -> None:
    target = find(render(), "StatefulSet", "pool-specpool-target")
    target["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(target, KUBERNETES_VERSIONS[0], strict=True)


@value_sets
def test_selectors_match_pods_and_nothing_else(render, values: dict[str, Any]) -> None:
    manifests = render(values)
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in manifests
        if each["kind"] in ("Deployment", "StatefulSet")
    }
    for each in manifests:
        if each["kind"] == "Service":
            selector = each["spec"]["selector"]
        elif each["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selector = each["spec"]["selector"]["matchLabels"]
        elif each["kind"] == "NetworkPolicy":
            selector = each["spec"]["podSelector"]["matchLabels"]
        else:
            continue
        matching = [name for name, labels in pods.items() if selector.items() <= labels.items()]
        assert matching == [each["metadata"]["name"]]


@value_sets
def test_the_router_watches_the_labels_the_engines_have(render, values: dict[str, Any]) -> None:
    manifests = render(values)
    router = workloads(manifests)["router"]["containers"][0]
    environment = {each["name"]: each.get("value") for each in router["env"]}
    for component in ("target", "speculator"):
        text = environment[f"SPECPOOL_ROUTER_{component.upper()}_SELECTOR"]
        selector = dict(part.split("=") for part in text.split(","))
        kind = {"target": "StatefulSet", "speculator": "Deployment"}[component]
        labels = find(manifests, kind, f"pool-specpool-{component}")["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert selector["app.kubernetes.io/component"] == component
    role = find(manifests, "Role", "pool-specpool-router")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]


@value_sets
def test_pods_are_unprivileged_probed_and_given_time_to_drain(render, values: dict[str, Any]) -> None:
    pods = workloads(render(values))
    for component in OUR_COMPONENTS:
        spec, container = pods[component], pods[component]["containers"][0]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        port = next(each["containerPort"] for each in container["ports"] if each["name"] == "grpc")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == port
        environment = {each["name"]: each.get("value") for each in container["env"]}
        drain_s = float(environment[f"SPECPOOL_{component.upper()}_DRAIN_GRACE_S"])
        pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] > drain_s + pause_s + EXIT_S
        liveness = container["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] > drain_s
    assert spec.get("automountServiceAccountToken", True)  # the router's; engines have none
    assert pods["target"]["automountServiceAccountToken"] is False


def test_the_termination_grace_period_follows_the_drain(render) -> None:
    pods = workloads(render({"drain": {"graceSeconds": 600, "preStopSeconds": 20}}))
    assert {pods[each]["terminationGracePeriodSeconds"] for each in OUR_COMPONENTS} == {635}


def test_no_fabric_places_pods_anywhere(render) -> None:
    assert "affinity" not in workloads(render())["speculator"]


@pytest.mark.parametrize(
    ("profile", "topology_key"),
    [
        ("same-node", "kubernetes.io/hostname"),
        ("infiniband", "topology.kubernetes.io/zone"),
        ("ethernet-rdma", "topology.kubernetes.io/zone"),
        ("efa", "topology.kubernetes.io/zone"),
    ],
)
def test_a_fabric_sets_the_sign_of_the_placement(render, profile: str, topology_key: str) -> None:
    resource = "" if profile == "same-node" else "example.com/rdma"
    pods = workloads(render({"fabric": {"profile": profile, "rdmaResource": resource}}))
    affinity = pods["speculator"]["affinity"]
    (near,) = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["topologyKey"] == topology_key
    if profile == "efa":
        (apart,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["topologyKey"] == "kubernetes.io/hostname"
        assert apart["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "target"
    else:
        assert "podAntiAffinity" not in affinity
    assert "affinity" not in pods["target"]
    expected = {"nvidia.com/gpu": 1} | ({resource: 1} if resource else {})
    for component in ("target", "speculator"):
        assert pods[component]["containers"][0]["resources"]["limits"] == expected


def test_a_model_is_split_over_all_gpus_of_its_pod(render) -> None:
    pods = workloads(render({"target": {"gpu": {"count": 4}}}))
    for component, count in {"target": 4, "speculator": 1}.items():
        (container,) = pods[component]["containers"]
        environment = {each["name"]: each.get("value") for each in container["env"]}
        assert environment[f"SPECPOOL_{component.upper()}_TENSOR_PARALLEL"] == str(count)
        assert container["resources"]["limits"] == {"nvidia.com/gpu": count}
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        volumes = {each["name"]: each for each in pods[component]["volumes"]}
        if count > 1:
            assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
        else:
            assert "/dev/shm" not in mounts


def test_colocated_pods_share_a_node_and_divide_its_gpu(render) -> None:
    values = yaml.safe_load((CHART / "ci" / "colocated-values.yaml").read_text())
    pods = workloads(render(values))
    shares = {
        "target": {"DEVICE_MEMORY_SHARE": "0.75", "STREAM_PRIORITY": "high"},
        "speculator": {"DEVICE_MEMORY_SHARE": "0.2"},
    }
    for component, expected in shares.items():
        (container,) = pods[component]["containers"]
        environment = {each["name"]: each.get("value") for each in container["env"]}
        for name, value in expected.items():
            assert environment[f"SPECPOOL_{component.upper()}_{name}"] == value
        assert container["resources"]["limits"] == {"nvidia.com/gpu.shared": 1}
        apart = pods[component]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert [component_of(term) for term in apart] == [component]
    beside = pods["speculator"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [component_of(term) for term in beside] == ["target"]
    assert "podAffinity" not in pods["target"]["affinity"], "a target must be able to come first"


def component_of(term: dict[str, Any]) -> str:
    """Of the pods that an affinity on a node is about."""
    assert term["topologyKey"] == "kubernetes.io/hostname"
    component: str = term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"]
    return component


def test_pods_that_are_not_colocated_have_their_gpus_to_themselves(render) -> None:
    pods = workloads(render())
    for component in ("target", "speculator"):
        environment = {each["name"]: each.get("value") for each in pods[component]["containers"][0]["env"]}
        assert environment[f"SPECPOOL_{component.upper()}_DEVICE_MEMORY_SHARE"] == "1"
        assert "affinity" not in pods[component]


def test_cpu_engines_ask_for_no_gpu_and_keep_their_limits(render) -> None:
    values = yaml.safe_load((CHART / "ci" / "cpu-values.yaml").read_text())
    values["target"]["resources"] = {"limits": {"memory": "9Gi"}}
    resources = workloads(render(values))["target"]["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "9Gi"}


@pytest.mark.parametrize("transport", ["grpc", "auto", "gloo", "nccl"])
def test_pairs_may_connect_for_their_process_groups(render, transport: str) -> None:
    manifests = render({"speculation": {"distributionTransport": transport}})
    for component, other in (("target", "speculator"), ("speculator", "target")):
        policy = find(manifests, "NetworkPolicy", f"pool-specpool-{component}")
        on_every_port = [
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in policy["spec"]["ingress"]
            if "ports" not in rule
            for peer in rule["from"]
        ]
        assert on_every_port == ([] if transport == "grpc" else [other])
    environment = {each["name"]: each.get("value") for each in workloads(manifests)["target"]["containers"][0]["env"]}
    assert environment["SPECPOOL_TARGET_DISTRIBUTION_TRANSPORT"] == transport


@pytest.mark.parametrize("release", ["r", "specpool", "a" * 53])
def test_names_fit_kubernetes(render, release: str) -> None:
    for manifest in render({}, release):
        name = manifest["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        # A StatefulSet's pods carry the label <name>-<hash of 10>.
        assert len(name) <= (52 if manifest["kind"] == "StatefulSet" else 63)


def test_shortened_names_stay_apart(render) -> None:
    names = [
        {manifest["metadata"]["name"] for manifest in render({"fullnameOverride": "x" * 50 + end})} for end in "ab"
    ]
    assert names[0].isdisjoint(names[1])


@value_sets
def test_everything_named_exists_in_the_release(render, values: dict[str, Any]) -> None:
    """Service accounts, the roles bound, the session store and the test's endpoint are what the chart installs."""
    manifests = render(values)
    router = workloads(manifests)["router"]
    find(manifests, "ServiceAccount", router["serviceAccountName"])
    binding = find(manifests, "RoleBinding", "pool-specpool-router")
    find(manifests, "Role", binding["roleRef"]["name"])
    for each in manifests:
        if each["kind"] == "StatefulSet":
            find(manifests, "Service", each["spec"]["serviceName"])
    (test_pod,) = [each for each in manifests if each["kind"] == "Pod"]
    endpoint = test_pod["spec"]["containers"][0]["args"][0].removeprefix("--endpoint=")
    service = find(manifests, "Service", endpoint.split(":")[0])
    assert service["spec"]["ports"][0]["port"] == int(endpoint.split(":")[1])
    environment = {each["name"]: each for each in router["containers"][0]["env"]}
    store = environment["SPECPOOL_ROUTER_SESSION_STORE"]
    if "value" in store:
        find(manifests, "Service", store["value"].removeprefix("redis://").split(":")[0])
    else:
        assert store["valueFrom"]["secretKeyRef"] == {"name": "sessions", "key": "url"}


def test_inline_tenants_reach_the_router_as_a_file_it_accepts(render, tmp_path: Path) -> None:
    values = yaml.safe_load((CHART / "ci" / "efa-values.yaml").read_text())
    manifests = render(values)
    secret = find(manifests, "Secret", "pool-specpool-tenants")
    (tmp_path / "tenants.yaml").write_text(secret["stringData"]["tenants.yaml"])
    tenants = load_tenants(str(tmp_path / "tenants.yaml"))
    with pytest.raises(Unauthenticated):
        tenants.authenticate([])
    assert tenants.authenticate([("authorization", "Bearer key")]).name == "acme"
    router = workloads(manifests)["router"]
    assert {"name": "tenants", "secret": {"secretName": "pool-specpool-tenants"}} in router["volumes"]
    (mount,) = [each for each in router["containers"][0]["volumeMounts"] if each["name"] == "tenants"]
    (variable,) = [each for each in router["containers"][0]["env"] if each["name"] == "SPECPOOL_ROUTER_TENANTS_FILE"]
    assert variable["value"] == f"{mount['mountPath']}/tenants.yaml"
