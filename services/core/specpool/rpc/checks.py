"""Checks of what peers send, where it enters: every error names the field, the value and what is accepted.

Protobuf bounds no number, and no comparison with NaN holds: `check_range` refuses it, whatever the range.
"""

from __future__ import annotations

from typing import Final

from specpool.request_limits import invalid_value

MAX_ROUND: Final = 2**31 - 1
"""Rounds are counted on from what peers say, and the sums must fit into the protocol's numbers."""
MAX_DRAFT_TOKENS: Final = 256
"""Of one round."""
MAX_WEIGHT: Final = 1e6
"""Of a tenant; sums and ratios of weights stay far from where float32 ends."""
MAX_NAME_CHARS: Final = 1024
"""Ids and names of sequences, tenants, peers and models."""
MAX_SALT_BYTES: Final = 1024
MAX_GRACE_S: Final = 7 * 24 * 3600.0


def check_range(field: str, value: float, low: float, high: float) -> None:
    """``low`` and ``high`` are accepted themselves."""
    if not low <= value <= high:
        raise invalid_value(field, value, f"between {low:.15g} and {high:.15g}")


def check_size(field: str, size: int, most: int) -> None:
    """Of a list, a text or bytes."""
    if size > most:
        raise invalid_value(field, f"{size} items", f"at most {most} long")


def check_weight(weight: float) -> None:
    """Of a tenant, as it travels: 0 is read as 1."""
    check_range("tenant_weight", weight, 0, MAX_WEIGHT)


def check_grace(seconds: float) -> None:
    """How long a drain may take."""
    check_range("grace_seconds", seconds, 0, MAX_GRACE_S)
