"""Arithmetic on a config: topology, batch, parameters, FLOPs and devices of a run, without torch."""

from dsmoe.plan.batch import Batch
from dsmoe.plan.devices import KNOWN_DEVICES, DeviceFacts, known_device, resolve_device
from dsmoe.plan.flops import Flops, flops_per_token
from dsmoe.plan.layers import head_dim, is_moe_layer, num_kv_heads, num_moe_layers
from dsmoe.plan.parameters import DeviceParameters, ParameterCounts, count_parameters
from dsmoe.plan.plan import Plan
from dsmoe.plan.topology import AXES, Axis, Topology

__all__ = [
    "AXES",
    "KNOWN_DEVICES",
    "Axis",
    "Batch",
    "DeviceFacts",
    "DeviceParameters",
    "Flops",
    "ParameterCounts",
    "Plan",
    "Topology",
    "count_parameters",
    "flops_per_token",
    "head_dim",
    "is_moe_layer",
    "known_device",
    "num_kv_heads",
    "num_moe_layers",
    "resolve_device",
]
