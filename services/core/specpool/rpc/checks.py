"""Checks of what peers send, where it enters: every error names the field, the value and what is accepted.

Protobuf bounds no number, and no comparison with NaN holds: `check_range` refuses it, whatever the range.
"""

from __future__ import annotations

from typing import Final

from specpool.request_limits import invalid_value

MAX_ROUND: Final = 2**31 - 1
"""Largest round number: rounds are counted on from what peers say, and the sums must fit the protocol's numbers."""
MAX_DRAFT_TOKENS: Final = 256
"""Most draft tokens of one round."""
MAX_WEIGHT: Final = 1e6
"""Largest weight of a tenant; sums and ratios of weights stay far from where float32 ends."""
MAX_NAME_CHARS: Final = 1024
"""Longest id or name of a sequence, tenant, peer or model, in characters."""
MAX_SALT_BYTES: Final = 1024
MAX_GRACE_S: Final = 7 * 24 * 3600.0


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of ``low`` to ``high``, which are accepted themselves. Raises InvalidArgument."""
    if not low <= value <= high:
        raise invalid_value(field, value, f"between {low:.15g} and {high:.15g}")


def check_size(field: str, size: int, most: int) -> None:
    """Refuse a list, a text or bytes with a size above ``most``. Raises InvalidArgument."""
    if size > most:
        raise invalid_value(field, f"{size} items", f"at most {most} long")


def check_weight(weight: float) -> None:
    """Refuse a bad weight of a tenant, as it travels: 0 is read as 1. Raises InvalidArgument."""
    check_range("tenant_weight", weight, 0, MAX_WEIGHT)


def check_grace(seconds: float) -> None:
    """Refuse a bad number of seconds that a drain may take. Raises InvalidArgument."""
    check_range("grace_seconds", seconds, 0, MAX_GRACE_S)
