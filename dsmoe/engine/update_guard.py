"""Stop the update of an optimizer step whose loss or gradient norm is not finite on any rank.

Such a step changes no weight, master, moment, selection bias or load share, and counts neither in Adam's bias
correction nor in the learning rate's schedule. All ranks have the same norm, so all of them stop. A loss that is not
finite may have a finite gradient; `propagate_non_finite` brings it into the norm.

| ZeRO stage | who stops the update |
|---|---|
| 1, 2 | DeepSpeed, which reads the norm on the host (0.19.8, runtime/zero/stage_1_and_2.py:3043) |
| 0, bf16 | DeepSpeed, which reads on the host whether gradients are finite (runtime/fp16/unfused_optimizer.py:205); \
where they are and their norm is not, the device |
| 0, fp32 | the device: torch's fused AdamW changes nothing where its `found_inf` is 1, on CPUs and GPUs |

The host does not wait for what the device decides. It learns of that in the next step (`UpdateGuard.settle`): before
the update, which needs the learning rate, and after a forward and backward pass were launched, so that the device has
work meanwhile.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# The norm of step n is not finite, and the schedule stands at e:
#   n, update        the device changes no weight and no moment; its flag is on the way to the host
#   n, afterwards    the engine has not heard of it, and steps the schedule to e + 1
#   n + 1, settle    the host reads the flag: n counts as skipped, and the schedule is at e again
#   n + 1, update    with the learning rate of e
class UpdateGuard:
    """Stops updates of one engine on the device, and tells the engine; `dsmoe.initialize` makes it."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._stopped: torch.Tensor | None = None
        """True on the device where it stopped the last update; None where the host knows."""
        is_cuda = engine.device.type == "cuda"
        self._on_host = torch.zeros((), dtype=torch.bool, pin_memory=is_cuda)
        """The same, once `_copied` has come to pass."""
        self._copied = torch.cuda.Event() if is_cuda else None

    def stop_unless_finite(self, adam: torch.optim.Optimizer, norm: torch.Tensor) -> None:
        """Make the coming step of `adam` change nothing if `norm`, 0-d on the device, is not finite.

        `found_inf` is how torch's gradient scaler stops a fused optimizer.
        """
        self._stopped = ~torch.isfinite(norm)
        adam.found_inf = self._stopped.float()  # type: ignore[attr-defined]
        # On a GPU queued and not waited for, into pinned memory; the event tells when it has been done.
        self._on_host.copy_(self._stopped, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def was_applied(self) -> bool | torch.Tensor:
        """Return whether the last update was applied: a bool where the host knows, else one on the device."""
        applied = bool(self._engine.was_step_applied())
        # Where DeepSpeed has not stopped the step, the device may have: not known on the host before `settle`.
        return ~self._stopped if applied and self._stopped is not None else applied

    def settle(self) -> None:
        """Make the engine count a last update that the device stopped as skipped, and set its schedule back.

        Waits for that update. Call it before the engine steps again; nothing happens the second time.
        """
        if self._stopped is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        # Cleared first: a second call has nothing to do, and must not count the step twice.
        self._stopped = None
        if not self._on_host:
            return
        self._engine._step_applied = False
        self._engine.skipped_steps += 1
        scheduler = self._engine.lr_scheduler
        # From e + 1 to e - 1, and a step to e, which also sets the learning rates.
        scheduler.last_epoch -= 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch may miss an optimizer step before this one
            scheduler.step()


def propagate_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss times 1, or times NaN where it is not finite: its gradient then is NaN too."""
    return loss * (0 * loss.detach() + 1)
