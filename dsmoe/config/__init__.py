"""The YAML file as one typed, frozen tree: schema, loading, cross-field checks, DeepSpeed's own config."""

from dsmoe.config.dump import dump_config
from dsmoe.config.errors import ConfigError, UserError
from dsmoe.config.load import load_config
from dsmoe.config.schema import Balance, Capacity, Config, Experts, Router

__all__ = [
    "Balance",
    "Capacity",
    "Config",
    "ConfigError",
    "Experts",
    "Router",
    "UserError",
    "dump_config",
    "load_config",
]
