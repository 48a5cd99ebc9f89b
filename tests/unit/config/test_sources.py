"""Precedence, unknown keys, conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import ValidationError, model_validator

from specpool.config import Settings, Share
from specpool.config.sources import Parser, load_config, parse_flags
from specpool.errors import ConfigError


class ExampleConfig(Settings):
    """An example."""

    model: str
    """Path or id."""
    max_lookahead: int = 4
    """Most draft tokens
    per round."""
    ratio: float = 1.0
    share: Share = 1.0
    cores: tuple[int, ...] = ()
    metrics_port: int | None = None
    policy: Literal["on", "off", "geometric"] = "geometric"
    strict: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strict and self.policy == "off":
            raise ConfigError("strict needs a policy", metadata={"field": "strict"})
        return self


def _load(
    file: Path | None = None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> ExampleConfig:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (environ or {}).items():
            patch.setenv(variable, value)
        return load_config(ExampleConfig, section="target", file=file, flags={"model": "m"} | (flags or {}))


def _flags(*arguments: str) -> dict[str, object]:
    return parse_flags(ExampleConfig, "target", arguments, Parser(prog="specpool target"))[0]


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
    assert _load(file, _flags("--max-lookahead", "7"), environ).max_lookahead == 7
    assert _load(file, _flags("--strict=true"), environ).max_lookahead == 6


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
    with pytest.raises(ConfigError, match="unrecognized arguments: --polcy on; `specpool target --help` lists"):
        _flags("--polcy", "on")
    with pytest.raises(ConfigError, match="argument --strict: expected one argument"):
        _flags("--strict")


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


def test_a_service_link_is_not_mistaken_for_the_metrics_port() -> None:
    assert _load(environ={"SPECPOOL_TARGET_METRICS_PORT": "tcp://10.0.0.1:9000"}).metrics_port is None


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("cores", "0, 2", (0, 2)),
        ("cores", "", ()),
        ("metrics_port", "none", None),
        ("metrics_port", "0", 0),
        ("policy", "off", "off"),
        ("model", "7", "7"),
        ("model", "a,b", "a,b"),
        ("model", '{"a": [1]}', '{"a": [1]}'),
        ("model", "null", "null"),
        ("strict", "on", True),
        ("ratio", "1", 1.0),
    ],
)
def test_text_is_converted(field: str, text: str, value: object) -> None:
    flag = f"--{field.replace('_', '-')}={text}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"SPECPOOL_TARGET_{field.upper()}", text)
        patch.setenv("SPECPOOL_TARGET_MODEL", "m" if field != "model" else text)
        from_environment = load_config(ExampleConfig, section="target")
    for loaded in (from_environment, _load(flags=_flags(flag))):
        assert getattr(loaded, field) == value
        assert type(getattr(loaded, field)) is type(value)


def test_words_that_yaml_takes_for_booleans_are_words(tmp_path: Path) -> None:
    assert _load(_yaml(tmp_path, "target: {policy: off}")).policy == "off"
    with pytest.raises(ConfigError, match=r"max_lookahead must be no boolean, got True .*target\.max_lookahead"):
        _load(_yaml(tmp_path, "target: {max_lookahead: yes}"))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("max_lookahead", "four", "a valid integer"),
        ("max_lookahead", 4.5, "a valid integer"),
        ("max_lookahead", True, "no boolean"),
        ("ratio", "nan", "a finite number"),
        ("share", 0, "more than 0"),
        ("share", "1.5", "at most 1"),
        ("model", 7, "a valid string"),
        ("policy", "best", "'on', 'off' or 'geometric'"),
        ("metrics_port", "x", "a valid integer"),
        ("strict", "maybe", "a valid boolean"),
    ],
)
def test_wrong_type_names_field_value_accepted_and_origin(field: str, value: object, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(flags={field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} must be {accepted}")
    assert message.endswith(f"got {value!r} (flag --{field.replace('_', '-')})")
    assert "\n" not in message
    assert caught.value.metadata["field"] == field


def test_errors_name_the_source_that_won(tmp_path: Path) -> None:
    file = _yaml(tmp_path, "target: {cores: [0, x]}")
    with pytest.raises(ConfigError, match=r"cores must be .*, got 'x' \(.*settings\.yaml: target\.cores\)"):
        _load(file)
    with pytest.raises(ConfigError, match=r"got 'y' \(environment variable SPECPOOL_TARGET_CORES\)"):
        _load(file, environ={"SPECPOOL_TARGET_CORES": "1,y"})
    with pytest.raises(ConfigError, match=r"got 'z' \(flag --cores\)"):
        _load(file, _flags("--cores", "z"), environ={"SPECPOOL_TARGET_CORES": "1,y"})


def test_settings_are_frozen_and_by_keyword() -> None:
    config = ExampleConfig(model="m")
    with pytest.raises(ValidationError, match="frozen"):
        config.max_lookahead = 5
    with pytest.raises(TypeError):
        ExampleConfig("m")  # type: ignore[call-arg, misc]
    with pytest.raises(ConfigError, match="unknown setting modl"):
        ExampleConfig(model="m", modl="n")  # type: ignore[call-arg]


def test_missing_required_and_contradictions_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"model is required: give --model, SPECPOOL_TARGET_MODEL or target\.model"):
        load_config(ExampleConfig, section="target")
    with pytest.raises(ConfigError, match="strict needs a policy"):
        _load(flags={"strict": "true", "policy": "off"})


@pytest.mark.parametrize("text", ["target: [1]", "- 1", "target: {a: ", "target: 3"])
def test_malformed_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        _load(_yaml(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        _load(tmp_path / "none.yaml")


def test_help_is_the_docstring_with_default_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _flags("--help")
    assert caught.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    assert "--max-lookahead INT Most draft tokens per round. (default: 4) [env: SPECPOOL_TARGET_MAX_LOOKAHEAD]" in (
        help_text
    )
    assert "--model TEXT Path or id. (required) [env: SPECPOOL_TARGET_MODEL]" in help_text
