"""Registry of the experts' activations: forward, backward, and the code of their kernel.

A new activation needs an entry here, one in `ACTIVATION_SHAPES` beside the field's type in
`dsmoe.config.sections.moe`, and a branch in `dsmoe.kernels.weighted_activation` unless its function has one.

Shape suffixes: see `dsmoe.moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsmoe.config.errors import UserError
from dsmoe.config.registry import entry_named
from dsmoe.config.sections.moe import ACTIVATION_SHAPES, ActivationShape
from dsmoe.kernels import on_gpu

Pointwise = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """act(z), or act(gate) * up with gate and up the halves of z where `gated`.

    Attributes:
        name: its key in `ACTIVATIONS`.
        shape: the entry of `ACTIVATION_SHAPES`, by which the planner counts.
        act: returns a new tensor; autograd can differentiate it, as dense blocks do.
        slope: of (grad, x): grad * act'(x).
        kernel: the code of the branch for `act` in `dsmoe.kernels.weighted_activation`; None without one.
    """

    name: str
    shape: ActivationShape
    act: Pointwise
    slope: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    kernel: str | None

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        """Copy and pickle by name: operators of torch cannot be pickled."""
        return find_activation, (self.name,)

    @property
    def gated(self) -> bool:
        """True if z has two halves, gate and up."""
        return self.shape.gated

    def forward(self, z_NZ: torch.Tensor) -> torch.Tensor:
        """[N, Z] -> [N, I]."""
        if not self.gated:
            return self.act(z_NZ)
        gate_NI, up_NI = z_NZ.chunk(2, dim=-1)
        return self.act(gate_NI).mul_(up_NI)

    def backward(
        self, grad_NI: torch.Tensor, z_NZ: torch.Tensor, weight_N1: torch.Tensor, grad_z_NZ: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backward pass of weight * forward(z), which is computed again.

        Overwrites `grad_NI`, the gradient of the weighted activation, and writes z's gradient into `grad_z_NZ`.

        Returns:
            The weighted activation [N, I], and the gradient of the weight [N], summed in fp32 at least.
        """
        gate_NI, up_NI = z_NZ.chunk(2, dim=-1) if self.gated else (z_NZ, None)
        act_NI = self.act(gate_NI)
        hidden_NI = act_NI if up_NI is None else act_NI * up_NI
        wide = torch.promote_types(grad_NI.dtype, torch.float32)
        grad_weight_N = (grad_NI * hidden_NI).sum(-1, dtype=wide)
        grad_NI.mul_(weight_N1)
        if up_NI is None:
            grad_z_NZ.copy_(self.slope(grad_NI, gate_NI))
        else:
            grad_gate_NI, grad_up_NI = grad_z_NZ.chunk(2, dim=-1)
            grad_up_NI.copy_(grad_NI).mul_(act_NI)
            grad_gate_NI.copy_(self.slope(grad_NI.mul_(up_NI), gate_NI))
        return hidden_NI.mul_(weight_N1), grad_weight_N

    def weighted(self, z_NZ: torch.Tensor, weight_N: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
        """Return the weight times forward(z), of the rows up to the last end."""
        if on_gpu(z_NZ):
            from dsmoe.kernels.weighted_activation import weighted_activation

            return weighted_activation(z_NZ, weight_N, ends_L, self)
        return self.forward(z_NZ).mul_(weight_N[:, None].to(z_NZ.dtype))

    def weighted_backward(
        self, grad_NI: torch.Tensor, z_NZ: torch.Tensor, weight_N: torch.Tensor, ends_L: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the result of `weighted` and the gradients of z and the weight. Overwrites `grad_NI`."""
        if on_gpu(z_NZ):
            from dsmoe.kernels.weighted_activation import weighted_activation_backward

            return weighted_activation_backward(grad_NI, z_NZ, weight_N, ends_L, self)
        grad_z_NZ = torch.empty_like(z_NZ)
        hidden_NI, grad_weight_N = self.backward(grad_NI, z_NZ, weight_N[:, None].to(z_NZ.dtype), grad_z_NZ)
        return hidden_NI, grad_z_NZ, grad_weight_N


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _relu2_slope(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * F.relu(x) * 2


_ATEN = torch.ops.aten
ACTIVATIONS = {
    "swiglu": Activation("swiglu", ACTIVATION_SHAPES["swiglu"], F.silu, _ATEN.silu_backward, kernel="silu"),
    "geglu": Activation("geglu", ACTIVATION_SHAPES["geglu"], F.gelu, _ATEN.gelu_backward, kernel="gelu"),
    "gelu": Activation("gelu", ACTIVATION_SHAPES["gelu"], F.gelu, _ATEN.gelu_backward, kernel="gelu"),
    "relu2": Activation("relu2", ACTIVATION_SHAPES["relu2"], _relu2, _relu2_slope, kernel="relu2"),
}
"""SwiGLU and GEGLU (Shazeer 2020), GELU, and squared ReLU (Primer, So et al. 2021)."""


def find_activation(name: str) -> Activation:
    """Return the activation of this name.

    Raises:
        UserError: there is none, or its shape is not the planner's.
    """
    activation = entry_named(ACTIVATIONS, "moe.activation", name)
    if activation.shape != ACTIVATION_SHAPES.get(name):
        raise UserError(f"moe.activation: ACTIVATION_SHAPES[{name!r}] is not {activation.shape}, as its entry says")
    return activation
