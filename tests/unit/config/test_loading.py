"""Precedence, unknown keys, conversions."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import pytest

from specpool.config import describe, load_config
from specpool.errors import ConfigError


class Policy(enum.Enum):
    GEOMETRIC = "geometric"
    UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """An example."""

    model: str
    """Path or id."""
    max_lookahead: int = 4
    """Most draft tokens
    per round."""
    ratio: float = 1.0
    cores: tuple[int, ...] = ()
    metrics_port: int | None = None
    policy: Policy = Policy.GEOMETRIC
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_lookahead < 0:
            raise ValueError("max_lookahead must be at least 0")


def _load(
    file: Path | None = None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> ExampleConfig:
    flags = {"model": "m"} | (flags or {})
    return load_config(ExampleConfig, section="target", file=file, flags=flags, environ=environ or {})


def _yaml(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = _yaml(tmp_path, "target: {max_lookahead: 5}\nrouter: {listen: 'x:1'}\n")
    environ = {"SPECPOOL_TARGET_MAX_LOOKAHEAD": "6"}
    assert _load().max_lookahead == 4
    assert _load(file).max_lookahead == 5
    assert _load(file, environ=environ).max_lookahead == 6
    assert _load(file, {"max_lookahead": 7}, environ).max_lookahead == 7
    assert _load(file, {"max_lookahead": None}, environ).max_lookahead == 6


def test_unknown_file_key_names_the_nearest(tmp_path: Path) -> None:
    file = _yaml(tmp_path, "target: {max_lokahead: 5}\n")
    with pytest.raises(ConfigError, match=r"unknown .*target\.max_lokahead; did you mean target\.max_lookahead\?"):
        _load(file)


def test_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="targt; did you mean target"):
        _load(_yaml(tmp_path, "targt: {}\n"))


def test_unknown_variable_and_flag_are_refused() -> None:
    with pytest.raises(ConfigError, match="SPECPOOL_TARGET_RATOI; did you mean SPECPOOL_TARGET_RATIO"):
        _load(environ={"SPECPOOL_TARGET_RATOI": "1"})
    with pytest.raises(ConfigError, match="unknown flag --polcy; did you mean --policy"):
        _load(flags={"polcy": "uniform"})


def test_other_sections_and_kubernetes_service_links_are_left_alone() -> None:
    environ = {
        "SPECPOOL_ROUTER_ANYTHING": "1",
        "SPECPOOL_TEST_MODELS": "x",
        "SPECPOOL_TARGET_SERVICE_HOST": "10.0.0.1",
        "SPECPOOL_TARGET_SERVICE_PORT_GRPC": "8000",
        "SPECPOOL_TARGET_PORT": "tcp://10.0.0.1:8000",
        "SPECPOOL_TARGET_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert _load(environ=environ) == _load()


def test_metrics_port_is_not_mistaken_for_a_service_link() -> None:
    assert _load(environ={"SPECPOOL_TARGET_METRICS_PORT": "9000"}).metrics_port == 9000


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("cores", "0, 2", (0, 2)),
        ("cores", "", ()),
        ("metrics_port", "none", None),
        ("metrics_port", "0", 0),
        ("policy", "UNIFORM", Policy.UNIFORM),
        ("strict", "on", True),
        ("ratio", "1", 1.0),
    ],
)
def test_text_is_converted(field: str, text: str, value: object) -> None:
    loaded = getattr(_load(environ={f"SPECPOOL_TARGET_{field.upper()}": text}), field)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("max_lookahead", "four", "an integer"),
        ("max_lookahead", 4.5, "an integer"),
        ("max_lookahead", True, "an integer"),
        ("ratio", "nan", "a finite number"),
        ("model", 7, "text"),
        ("policy", "best", "one of geometric, uniform"),
        ("cores", "0,x", "a list, each entry an integer"),
        ("metrics_port", "x", "an integer or none"),
        ("strict", "maybe", "true or false"),
    ],
)
def test_wrong_type_names_field_value_accepted_and_origin(field: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(flags={field: value})
    assert str(caught.value) == f"{field} must be {accepted}, got {value!r} (flag --{field.replace('_', '-')})"
    assert caught.value.metadata["field"] == field


def test_missing_required_and_contradictions_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"model is required: give --model, SPECPOOL_TARGET_MODEL or target\.model"):
        load_config(ExampleConfig, section="target", environ={})
    with pytest.raises(ConfigError, match="max_lookahead must be at least 0"):
        _load(flags={"max_lookahead": -1})


@pytest.mark.parametrize("text", ["target: [1]", "- 1", "target: {a: ", "target: 3"])
def test_malformed_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        _load(_yaml(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        _load(tmp_path / "none.yaml")


def test_describe_reads_docstrings() -> None:
    docs = {doc.name: doc for doc in describe(ExampleConfig)}
    assert docs["model"].required
    assert docs["max_lookahead"].doc == "Most draft tokens per round."
    assert docs["max_lookahead"].default == 4
    assert docs["metrics_port"].type_name == "int | None"
    assert docs["ratio"].doc == ""
    assert docs["max_lookahead"].variable("target") == "SPECPOOL_TARGET_MAX_LOOKAHEAD"
