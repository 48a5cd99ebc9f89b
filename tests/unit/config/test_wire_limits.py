"""Settings that are told to others fit into the messages that tell them."""

from __future__ import annotations

import pytest

from specpool.errors import ConfigError
from specpool.rpc.checks import MAX_DRAFT_TOKENS
from specpool_speculator.config import SpeculatorConfig
from specpool_target.config import TargetConfig


@pytest.mark.parametrize(
    ("config", "name", "largest"),
    [
        (TargetConfig, "max_lookahead", MAX_DRAFT_TOKENS),
        (SpeculatorConfig, "max_lookahead", MAX_DRAFT_TOKENS),
        (SpeculatorConfig, "row_budget", 2**31 - 1),
        (SpeculatorConfig, "max_sequences", 2**31 - 1),
    ],
)
def test_what_no_message_can_tell_is_refused(
    config: type[TargetConfig] | type[SpeculatorConfig], name: str, largest: int
) -> None:
    config(model="toy#vocab=64", **{name: largest})
    with pytest.raises(ConfigError, match=f"{name} must be at most"):
        config(model="toy#vocab=64", **{name: largest + 1})
