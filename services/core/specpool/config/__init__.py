"""Settings: flags over environment over YAML file over defaults; unknown keys are refused by name."""

from specpool.config.describe import FieldDoc, describe
from specpool.config.loading import SECTIONS, flag_name, load_config, variable_name

__all__ = ["SECTIONS", "FieldDoc", "describe", "flag_name", "load_config", "variable_name"]
