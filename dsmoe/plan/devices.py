"""Data sheets of the accelerators that a config can name.

`memory_gib` is what a process can use: the total that torch reports for the device, which is what its out-of-memory
messages print. It is not the sheet's number: an "80 GB" H100 offers 79.1 GiB and a "141 GB" H200 139.8 GiB.
`peak_tflops` is the sheet's bf16 tensor rate with fp32 accumulation, without sparsity; sheets that print only the
sparse rate (marked *) are halved.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dsmoe.config.errors import Problem, UserError
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.schema import Config, Device


@dataclass(frozen=True)
class DeviceFacts:
    """Memory and peak rate of a device, for planning and MFU; None where unknown."""

    name: str
    memory_gib: float | None
    """Usable device memory in GiB."""
    peak_tflops: float | None
    """Dense bf16 matrix rate in TFLOP/s; the denominator of MFU."""


_KNOWN = (
    # NVIDIA A100 Tensor Core GPU data sheet (June 2021): 312 TFLOPS in every form.
    DeviceFacts("a100-40gb", memory_gib=39.4, peak_tflops=312.0),
    DeviceFacts("a100-80gb", memory_gib=79.1, peak_tflops=312.0),
    # NVIDIA H100 Tensor Core GPU data sheet: SXM 1,979* and PCIe 1,513*.
    DeviceFacts("h100-sxm", memory_gib=79.1, peak_tflops=989.5),
    DeviceFacts("h100-pcie", memory_gib=79.1, peak_tflops=756.5),
    # NVIDIA H200 Tensor Core GPU data sheet: SXM 1,979*.
    DeviceFacts("h200", memory_gib=139.8, peak_tflops=989.5),
    # NVIDIA Blackwell architecture technical brief: HGX B200 at 1,000 W 4,500*, GB200 at 1,200 W 5,000*.
    DeviceFacts("b200", memory_gib=178.3, peak_tflops=2250.0),
    DeviceFacts("gb200", memory_gib=184.3, peak_tflops=2500.0),
    # AMD Instinct MI300X data sheet: 1,307.4 dense.
    DeviceFacts("mi300x", memory_gib=191.6, peak_tflops=1307.4),
    # NVIDIA L40S data sheet: 362.05 dense; memory with ECC on, the default.
    DeviceFacts("l40s", memory_gib=44.3, peak_tflops=362.05),
    # NVIDIA Ada GPU architecture whitepaper, table for GeForce RTX 4090: 165.2 dense.
    DeviceFacts("rtx4090", memory_gib=23.5, peak_tflops=165.2),
    # Trains over gloo; its peak depends on the machine, and no MFU is better than a wrong one.
    DeviceFacts("cpu", memory_gib=None, peak_tflops=None),
)

KNOWN_DEVICES: dict[str, DeviceFacts] = {facts.name: facts for facts in _KNOWN}

_REPORTED = {
    "A100-PCIE-40GB": "a100-40gb",
    "A100-SXM4-40GB": "a100-40gb",
    "A100 80GB PCIe": "a100-80gb",
    "A100-SXM4-80GB": "a100-80gb",
    "H100 80GB HBM3": "h100-sxm",
    "H100 PCIe": "h100-pcie",
    "H200": "h200",
    "B200": "b200",
    "GB200": "gb200",
    "AMD Instinct MI300X": "mi300x",
    "L40S": "l40s",
    "GeForce RTX 4090": "rtx4090",
}
"""Names in `KNOWN_DEVICES` by the name that a device reports, without "NVIDIA", for exactly these models."""


def known_device(name: str) -> str | None:
    """Return the name of `KNOWN_DEVICES` for a device that calls itself `name`, as torch.cuda.get_device_name does.

    None where the table has no such device: also for its relatives (`H100 NVL`, `H200 NVL`, a MIG slice), whose rates
    are others.
    """
    return _REPORTED.get(name.removeprefix("NVIDIA "))


def resolve_device(device: str | Device | None) -> DeviceFacts | None:
    """Look up `cluster.device`: a known name, a description, or None for hardware nobody described.

    Raises:
        UserError: no device of that name is known.
    """
    if device is None:
        return None
    if isinstance(device, Device):
        return DeviceFacts("described in the config", memory_gib=device.memory_gib, peak_tflops=device.peak_tflops)
    if device in KNOWN_DEVICES:
        return KNOWN_DEVICES[device]
    similar = difflib.get_close_matches(device.lower(), KNOWN_DEVICES, n=1, cutoff=0.5)
    suggestion = f"did you mean {similar[0]!r}? " if similar else ""
    raise UserError(
        f"cluster.device ({device!r}) is not a known device; {suggestion}known: {', '.join(KNOWN_DEVICES)}; "
        "or describe it with {memory_gib: ..., peak_tflops: ...}"
    )


def device_problems(config: Config) -> list[Problem]:
    """The problem that `resolve_device` finds, for `load_config`."""
    try:
        resolve_device(config.cluster.device)
    except InvalidKeyError:
        return []
    except UserError as error:
        return [("cluster.device", str(error))]
    return []
