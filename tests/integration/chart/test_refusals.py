"""Values that contradict each other, or cannot be, are refused with a message that names them."""

from __future__ import annotations

from typing import Any

import pytest

SHARED: dict[str, Any] = {"gpu": {"memoryShare": 0.5}}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"target": {"gpu": {"count": 0}}},
        "target.device is cuda but target.gpu.count is 0: set the count to 1, or the device to cpu",
    ),
    (
        {"speculator": {"device": "cpu"}},
        "speculator.device is cpu but speculator.gpu.count is 1: the GPU would stand idle; set the count to 0",
    ),
    (
        {"target": {"gpu": {"count": 2, "resourceName": "nvidia.com/mig-3g.40gb"}}},
        "target.gpu.count is 2 but target.gpu.resourceName is nvidia.com/mig-3g.40gb: "
        "a model cannot be split over MIG slices",
    ),
    (
        {"target": {"device": "cpu", "dtype": "float16", "gpu": {"count": 0}}},
        "target.dtype is float16 but target.device is cpu: use bfloat16 or float32 there",
    ),
    (
        {"target": {"device": "cpu", "attentionBackend": "flash", "blockSize": 256, "gpu": {"count": 0}}},
        "target.attentionBackend is flash but target.device is cpu: use sdpa or native there",
    ),
    (
        {"speculator": {"attentionBackend": "native"}},
        "speculator.attentionBackend is native but speculator.device is cuda: use sdpa, flex or flash there",
    ),
    (
        {"target": {"attentionBackend": "flash", "blockSize": 256, "dtype": "float32"}},
        "target.attentionBackend is flash but target.dtype is float32: use bfloat16 or float16, or sdpa or flex",
    ),
    (
        {"speculator": {"attentionBackend": "flash"}},
        "speculator.attentionBackend is flash but speculator.blockSize is 16: it needs a multiple of 256",
    ),
    (
        {"speculator": {"device": "cpu", "gpu": {"count": 0, "memoryShare": 0.5}}},
        "speculator.gpu.memoryShare is 0.5 but speculator.device is cpu: only a GPU is shared out",
    ),
    (
        {"colocated": True},
        "colocated is true but target.gpu.memoryShare is 1 and speculator.gpu.memoryShare is 1: "
        "together they must be at most 1, for example 0.75 and 0.2",
    ),
    (
        {"colocated": True, "target": SHARED, "speculator": {"device": "cpu", "gpu": {"count": 0}}},
        "colocated is true but speculator.device is cpu: both engines share one CUDA device",
    ),
    (
        {"colocated": True, "target": {"gpu": {"memoryShare": 0.5, "count": 2}}, "speculator": SHARED},
        "colocated is true but target.gpu.count is 2: both engines share one GPU",
    ),
    (
        {"colocated": True, "target": SHARED, "speculator": {"gpu": {"memoryShare": 0.5, "resourceName": "other"}}},
        "colocated is true but target.gpu.resourceName is nvidia.com/gpu and speculator.gpu.resourceName is other: "
        "name the one resource that the device plugin shares",
    ),
    (
        {"colocated": True, "target": SHARED, "speculator": SHARED | {"replicas": 2}},
        "colocated is true but speculator.replicas is 2 and target.replicas is 1: each speculator needs a target's GPU",
    ),
    (
        {
            "colocated": True,
            "target": SHARED,
            "speculator": SHARED,
            "speculation": {"distributionTransport": "nccl"},
        },
        "colocated is true but speculation.distributionTransport is nccl: "
        "NCCL refuses two processes on one GPU, set it to grpc or gloo",
    ),
    (
        {"colocated": True, "target": SHARED, "speculator": SHARED, "fabric": {"profile": "same-node"}},
        "colocated is true but fabric.profile is same-node: pods that share a GPU are on one node, set it to none",
    ),
    (
        {"speculation": {"fanOut": 16, "rowBudget": 8}},
        "speculation.rowBudget is 8 but speculation.fanOut is 16: "
        "the rows of one step must hold the guesses of one sequence",
    ),
    (
        {"speculation": {"distributionTransport": "nccl"}, "speculator": {"device": "cpu", "gpu": {"count": 0}}},
        "speculation.distributionTransport is nccl but speculator.device is cpu: "
        "nccl moves tensors between GPUs; use gloo",
    ),
    (
        {"fabric": {"profile": "infiniband"}},
        "fabric.profile is infiniband but fabric.rdmaResource is empty: name the device plugin's resource",
    ),
    (
        {"fabric": {"rdmaResource": "rdma/ib"}},
        "fabric.rdmaResource is rdma/ib but fabric.profile is none, which uses no RDMA device",
    ),
    (
        {"fabric": {"topologyKey": "example.com/rack"}},
        "fabric.topologyKey is example.com/rack but fabric.profile is none, which places pods anywhere",
    ),
    (
        {"fabric": {"profile": "same-node", "topologyKey": "example.com/rack"}},
        "fabric.topologyKey is example.com/rack but fabric.profile is same-node: leave the key empty",
    ),
    (
        {"fabric": {"profile": "same-node"}, "speculator": {"replicas": 0}},
        "fabric.profile is same-node but speculator.replicas is 0: there is no speculator to place",
    ),
    (
        {"redis": {"enabled": False}},
        "redis.enabled is false but redis.external.url and redis.external.existingSecret are empty: "
        "routers need a session store",
    ),
    (
        {"redis": {"external": {"url": "redis://elsewhere:6379"}}},
        "redis.enabled is true but redis.external.url is redis://elsewhere:6379: choose one session store",
    ),
    (
        {"redis": {"external": {"existingSecret": "sessions"}}},
        "redis.enabled is true but redis.external.existingSecret is sessions: choose one session store",
    ),
    (
        {"redis": {"enabled": False, "external": {"url": "redis://elsewhere:6379", "existingSecret": "sessions"}}},
        "redis.external.url is redis://elsewhere:6379 but redis.external.existingSecret is sessions: give the URL once",
    ),
    (
        {"redis": {"enabled": False, "storage": "1Gi", "external": {"url": "redis://elsewhere:6379"}}},
        "redis.storage is 1Gi but redis.enabled is false: there is no volume to size",
    ),
    (
        {"tenants": {"inline": [{"name": "a", "key_sha256": "0"}], "existingSecret": "tenants"}},
        "tenants.inline is set but tenants.existingSecret is tenants: keep the tenants in one place",
    ),
    (
        {"helmTest": {"apiKeySecret": "key"}},
        "helmTest.apiKeySecret is key but tenants.inline and tenants.existingSecret are empty: no key is asked for",
    ),
    (
        {"modelCache": {"existingClaim": "models", "sizeLimit": "10Gi"}},
        "modelCache.existingClaim is models but modelCache.sizeLimit is 10Gi: the claim has its own size",
    ),
    (
        {"grpcPort": 9100},
        "grpcPort is 9100 but telemetry.metricsPort is 9100: they must differ",
    ),
    (
        {"telemetry": {"podMonitor": {"labels": {"release": "prometheus"}}}},
        "telemetry.podMonitor.labels is set but telemetry.scrape is annotations: there is no PodMonitor to label",
    ),
]

OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"target": {"modle": "x"}}, "at '/target': additional properties 'modle' not allowed"),
    ({"extra": 1}, "at '': additional properties 'extra' not allowed"),
    ({"target": {"model": ""}}, "at '/target/model': minLength: got 0, want 1"),
    ({"target": {"replicas": 0}}, "at '/target/replicas': minimum: got 0, want 1"),
    ({"target": {"gpu": {"memoryShare": 1.5}}}, "at '/target/gpu/memoryShare': maximum: got 1.5, want 1"),
    ({"speculation": {"lookahead": 0}}, "at '/speculation/lookahead': minimum: got 0, want 1"),
    ({"telemetry": {"samplingRatio": 1.5}}, "at '/telemetry/samplingRatio': maximum: got 1.5, want 1"),
    (
        {"fabric": {"profile": "nvlink"}},
        "at '/fabric/profile': value must be one of 'none', 'same-node', 'infiniband', 'ethernet-rdma', 'efa'",
    ),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS, ids=lambda case: None)
def test_contradictions_are_refused_naming_both_values(template, values: dict[str, Any], message: str) -> None:
    finished = template(values)
    assert finished.returncode != 0
    assert _listed(finished.stderr) == [message]


def test_all_contradictions_are_named_at_once(template) -> None:
    finished = template({"grpcPort": 9100, "redis": {"enabled": False}})
    assert len(_listed(finished.stderr)) == 2


@pytest.mark.parametrize(("values", "message"), OUT_OF_RANGE, ids=lambda case: None)
def test_single_values_out_of_range_are_refused_by_the_schema(template, values: dict[str, Any], message: str) -> None:
    finished = template(values)
    assert finished.returncode != 0
    assert _listed(finished.stderr) == [message]


def _listed(stderr: str) -> list[str]:
    return [line.removeprefix("- ") for line in stderr.splitlines() if line.startswith("- ")]
