"""dsmoe: pretrain Mixture-of-Experts language models on DeepSpeed.

The names below load what they need when they are first used, so that reading a config or planning a run imports
neither torch nor DeepSpeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe.config import Balance, Capacity, Config, ConfigError, Experts, Router, UserError, load_config
    from dsmoe.model import build_model
    from dsmoe.moe import Layout, MoE
    from dsmoe.parallel import Groups
    from dsmoe.plan import Topology
    from dsmoe.train import initialize

__version__ = "0.1.0"
__all__ = [
    "Balance",
    "Capacity",
    "Config",
    "ConfigError",
    "Experts",
    "Groups",
    "Layout",
    "MoE",
    "Router",
    "Topology",
    "UserError",
    "__version__",
    "build_model",
    "initialize",
    "load_config",
]

_HOME = {
    "Config": "dsmoe.config",
    "ConfigError": "dsmoe.config",
    "load_config": "dsmoe.config",
    "Topology": "dsmoe.plan",
    "Groups": "dsmoe.parallel",
    "MoE": "dsmoe.moe",
    "Layout": "dsmoe.moe",
    **dict.fromkeys(("Balance", "Capacity", "Experts", "Router", "UserError"), "dsmoe.config"),
    "build_model": "dsmoe.model",
    "initialize": "dsmoe.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsmoe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
