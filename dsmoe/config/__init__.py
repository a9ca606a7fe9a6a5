"""Configuration: schema of the YAML file, loading, cross-field checks, and the generated DeepSpeed config."""

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
