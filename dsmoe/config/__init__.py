"""The YAML file as one typed, frozen tree: schema, loading, cross-field checks, DeepSpeed's own config."""

from dsmoe.config.errors import ConfigError, UserError
from dsmoe.config.load import load_config
from dsmoe.config.schema import Config
from dsmoe.config.show import dump_config

__all__ = ["Config", "ConfigError", "UserError", "dump_config", "load_config"]
