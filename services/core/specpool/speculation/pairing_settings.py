"""How eagerly sequences move between speculators."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingSettings:
    """How eagerly sequences move. The defaults suit rounds of milliseconds to a second."""

    review_interval_s: float = 1.0
    """Seconds between two looks at everything, if nothing happens."""
    status_interval_s: float = 5.0
    """Seconds between two status calls to a speculator."""
    urgent_status_interval_s: float = 1.0
    """Seconds between two status calls while some sequence has no speculator."""
    shortest_status_pause_s: float = 0.1
    """The mean time between two status calls to any speculators is no shorter; a call takes 2 ms of a core."""
    crowded_for_s: float = 10.0
    """Seconds for which there must have been a better place before sequences move to it."""
    shortest_stay_s: float = 30.0
    """Seconds for which a sequence that moved stays, except with a speculator that is lost, leaves or is silent."""
    longest_leave_s: float = 5.0
    """Seconds for which a speculator that goes away is still used while there is no other."""
    idle_link_s: float = 60.0
    """Seconds after which a connection without sequences, beside another, is closed."""
