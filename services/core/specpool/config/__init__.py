"""Settings: flags over environment over YAML file over defaults; unknown keys are refused by name.

`Settings` is what the classes of settings derive from, and needs pydantic only. `sources` reads flags,
variables and files; services are handed what it makes and never import it. Any package may import this one. Start
reading in `settings`.
"""

from specpool.config.settings import ServiceSettings, Settings, Share, invalid

__all__ = ["ServiceSettings", "Settings", "Share", "invalid"]
