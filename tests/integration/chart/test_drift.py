"""Generated and hand-written parts of the chart agree with each other and with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from metric_series import series_names

from specpool_router.metrics import RouterMetrics
from specpool_speculator.metrics import SpeculatorMetrics
from specpool_target.metrics import TargetMetrics

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "specpool"
REGISTRIES = {
    "target": TargetMetrics("model").registry,
    "speculator": SpeculatorMetrics("model").registry,
    "router": RouterMetrics().registry,
}


def test_readme_and_schema_are_generated_from_the_values() -> None:
    finished = subprocess.run(
        [sys.executable, CHART / "ci" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_one_resource_per_file(render) -> None:
    paths = list((CHART / "templates").rglob("*.yaml"))
    assert len(paths) > 5
    for path in paths:
        assert path.read_text().count("\nkind: ") <= 1, path


@pytest.mark.parametrize("component", ["target", "speculator", "router"])
def test_every_metric_kept_by_a_pod_monitor_is_exported(render, component: str) -> None:
    manifests = render({"telemetry": {"scrape": "podMonitor"}})
    (monitor,) = [
        each
        for each in manifests
        if each["kind"] == "PodMonitor" and each["metadata"]["name"] == f"pool-specpool-{component}"
    ]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (rule,) = endpoint["metricRelabelings"]
    exported = series_names(REGISTRIES[component])
    named = yaml.safe_load((CHART / "files" / "metrics.yaml").read_text())[component]
    assert named
    for name in named:
        series = {name, *(f"{name}_{suffix}" for suffix in ("bucket", "sum", "count"))} & exported
        assert series, f"{name} is not exported by the {component}"
        assert all(re.fullmatch(rule["regex"], each) for each in series)
    assert not re.fullmatch(rule["regex"], "python_info")


def test_the_chart_carries_the_version_of_the_code() -> None:
    import specpool

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == specpool.__version__
