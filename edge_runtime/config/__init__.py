"""The typed configuration of the edge; see `schema` for every key."""

from .load import ConfigError, LoadedConfig, load_config, public_dict
from .schema import EdgeConfig

__all__ = ["ConfigError", "EdgeConfig", "LoadedConfig", "load_config", "public_dict"]
