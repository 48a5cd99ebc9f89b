"""How eagerly sequences move between speculators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingSettings:
    """How eagerly sequences move. The defaults suit rounds of milliseconds to a second."""

    review_interval_s: float = 1.0
    """Between two looks at everything, if nothing happens."""
    status_interval_s: float = 5.0
    """Between two status calls to a speculator."""
    urgent_status_interval_s: float = 1.0
    """The same while some sequence has no speculator."""
    crowded_for_s: float = 10.0
    """A better place must have been there for so long before sequences move to it."""
    shortest_stay_s: float = 30.0
    """A sequence that moved does not move again before, except from a speculator that is lost, leaves or is silent."""
    longest_leave_s: float = 5.0
    """A speculator that goes away is used for so long while there is no other."""
    idle_link_s: float = 60.0
    """A connection without sequences, beside another, is closed after this."""
