"""What a simulation is given: times of forwards, quality of the draft, settings of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from specpool.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a planning simulation computes with: hardware, pair of models, and settings. Times in milliseconds."""

    verify_ms: float
    """Time of the target's forward, without what each token adds."""
    verify_row_ms: float = 0.0
    """Time that each verified token adds to the forward."""
    draft_step_ms: float
    """Time of the draft's step, without what each row adds."""
    draft_row_ms: float = 0.0
    """Time that each row adds to the step."""
    draft_free_rows: int = 0
    """Number of rows that add nothing: as many as are computed while the weights are read."""
    round_trip_ms: float = 0.5
    """Time from target to speculator and back."""
    acceptance: float
    """Probability that a draft token is the target's, given that those before it were."""
    confidence_spread: float = 0.39
    """How much surer the draft is here than there: the variance of its first token's probability, over a (1 - a).
    0: equally sure everywhere, 1: it knows whether it is right."""
    miss_constant: float = 0.48
    """Constant c of the miss law c / F^r: the target's token is not among the next F ranks, given that it is not the
    first."""
    miss_exponent: float = 0.7
    """Exponent r of the miss law."""
    lookahead: int = 4
    """Lookahead K: most draft tokens of a round."""
    fan_out: int = 12
    """Guesses per sequence and round (B)."""
    row_budget: int = 16
    """Most branch rows per draft step."""
    fan_out_policy: str = "best_first"
    """How guesses are spread: the speculator's setting of that name."""

    def __post_init__(self) -> None:
        """Refuse values that can never be. Raises InvalidArgument."""
        for name in ("verify_ms", "draft_step_ms"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "greater than 0")
        for name in ("verify_row_ms", "draft_row_ms", "draft_free_rows", "round_trip_ms", "miss_exponent"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("acceptance", "confidence_spread", "miss_constant"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("lookahead", "fan_out", "row_budget"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read a YAML file. Raises InvalidArgument, which names unknown and missing keys."""
        document = yaml.safe_load(path.read_text())
        if not isinstance(document, Mapping):
            raise InvalidArgument(f"{path}: a mapping of profile keys is expected", metadata={"field": "profile"})
        return cls.parse(document)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Profile:
        """Make a profile of keys and values. Raises InvalidArgument, which names unknown and missing keys."""
        known = {field.name: field for field in fields(cls)}
        for name, value in document.items():
            if name not in known:
                raise InvalidArgument(
                    f"unknown key {name!r} in the profile; accepted: {', '.join(known)}",
                    metadata={"field": str(name), "accepted": ", ".join(known)},
                )
            accepted = _ACCEPTED_TYPES[str(known[name].type)]
            _check(
                name, value, isinstance(value, accepted) and not isinstance(value, bool), f"of type {known[name].type}"
            )
        for name in ("verify_ms", "draft_step_ms", "acceptance"):
            if name not in document:
                raise InvalidArgument(f"the profile lacks {name}", metadata={"field": name})
        return cls(**document)


_ACCEPTED_TYPES: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,)}


def _check(name: str, value: object, is_good: bool, accepted: str) -> None:
    if not is_good:
        raise InvalidArgument(
            f"{name} must be {accepted}, got {value}",
            metadata={"field": name, "value": str(value), "accepted": accepted},
        )
