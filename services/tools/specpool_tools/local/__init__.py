"""A whole pool as processes of one machine: `specpool up`, its supervisor, and what it leaves for other commands."""
