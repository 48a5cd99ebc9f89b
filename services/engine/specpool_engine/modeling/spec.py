"""Model specifications: how a model is named on a command line or in a settings file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from specpool.errors import InvalidArgument

ACCEPTED_FORMS = (
    "a Hugging Face hub id (ORG/NAME), a directory with config.json and *.safetensors, or a .gguf file, "
    "each optionally followed by #layers=N; random#like=MODEL; "
    "toy#vocab=V,seed=S[,agreement=A][,noise=D][,step_ms=M][,row_ms=R]; timed#... with the same options"
)


class ModelKind(StrEnum):
    """How a model computes logits, and with that which loader makes it."""

    TRANSFORMERS = "transformers"
    RANDOM = "random"
    TOY = "toy"
    TIMED = "timed"


_TOY_OPTIONS = frozenset(
    {"vocab", "seed", "agreement", "draft_seed", "noise", "step_ms", "row_ms", "context", "sharpness"}
)
_OPTIONS: Mapping[ModelKind, frozenset[str]] = {
    ModelKind.TRANSFORMERS: frozenset({"layers"}),
    ModelKind.RANDOM: frozenset({"like"}),
    ModelKind.TOY: _TOY_OPTIONS,
    ModelKind.TIMED: _TOY_OPTIONS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model specification, `SOURCE[#key=value[,key=value...]]`, taken apart."""

    text: str
    """The specification as the user wrote it."""
    kind: ModelKind
    """Kind of the model, which says what loader is responsible."""
    source: str
    """Hub id or path; for `random` the model whose vocabulary and tokenizer it has."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options that followed the `#`, by name."""

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Parse `SOURCE[#key=value[,key=value...]]`."""
        source, _, rest = text.partition("#")
        if not source:
            raise InvalidArgument(f"empty model specification {text!r}; accepted: {ACCEPTED_FORMS}")
        kind = ModelKind(source) if source in ("random", "toy", "timed") else ModelKind.TRANSFORMERS
        options = _parse_options(text, rest, kind)
        if kind is ModelKind.RANDOM:
            if "like" not in options:
                raise InvalidArgument(f"{text!r} needs like=MODEL to take vocabulary and tokenizer from")
            source = options["like"]
        spec = cls(text=text, kind=kind, source=source, options=options)
        _ = spec.num_layers  # refused here rather than after a download
        return spec

    @property
    def num_layers(self) -> int | None:
        """Number of layers to use, if only some are asked for; None: all."""
        return self.integer("layers", None, minimum=1)

    def integer(self, name: str, default: int | None, *, minimum: int = 0) -> int | None:
        """The value of an integer option, or `default` where it is not given. Raises InvalidArgument."""
        value = self.options.get(name)
        if value is None:
            return default
        if not value.isdecimal() or int(value) < minimum:
            raise InvalidArgument(f"option {name!r} of {self.text!r} must be an integer >= {minimum}, got {value!r}")
        return int(value)

    def number(self, name: str, default: float, *, maximum: float = float("inf")) -> float:
        """The value of a number option that is not negative, or `default`. Raises InvalidArgument."""
        value = self.options.get(name)
        try:
            number = default if value is None else float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number <= maximum:
            raise InvalidArgument(f"option {name!r} of {self.text!r} must be a number in [0, {maximum}], got {value!r}")
        return number


def _parse_options(text: str, rest: str, kind: ModelKind) -> dict[str, str]:
    options: dict[str, str] = {}
    if kind is ModelKind.RANDOM and rest.startswith("like="):
        return {"like": rest.removeprefix("like=")}  # may itself have options
    for item in filter(None, rest.split(",")):
        name, separator, value = item.partition("=")
        if not separator or name not in _OPTIONS[kind]:
            raise InvalidArgument(
                f"unknown option {item!r} in model specification {text!r}; "
                f"a {kind} model accepts {', '.join(sorted(_OPTIONS[kind]))}"
            )
        options[name] = value
    return options
