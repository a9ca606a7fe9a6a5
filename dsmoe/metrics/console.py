"""The one line that a person watches."""

from __future__ import annotations

from collections.abc import Mapping


def console_line(metrics: Mapping[str, float], step: int, steps: int, memory_gib: float | None) -> str:
    """`step 120/20000 0.6% loss 7.0412 gnorm 0.84 lr 2.40e-04 ...`; figures that there are none of are left out.

    Args:
        metrics: by name.
        step: optimizer steps done.
        steps: of how many.
        memory_gib: what a device has, None where it is not known.
    """
    parts = [
        f"step {step}/{steps} {100 * step / steps:.1f}%",
        f"loss {metrics['train/loss']:.4f} gnorm {metrics['optim/grad_norm']:.2f} lr {metrics['optim/lr']:.2e}",
    ]
    if "moe/balance_loss" in metrics:
        parts.append(
            f"bal {metrics['moe/balance_loss']:.3f} drop {metrics['moe/dropped_percent']:.2f}% "
            f"max/mean {metrics['moe/load_max_over_mean']:.2f}"
        )
    parts.append(f"{_thousands(metrics['throughput/tokens_per_second'])} tok/s")
    if "throughput/mfu_percent" in metrics:
        causal = metrics["throughput/mfu_percent_causal"]
        parts.append(f"MFU {metrics['throughput/mfu_percent']:.1f}% (causal {causal:.1f}%)")
    of_memory = f"/{memory_gib:.1f}" if memory_gib else ""
    parts.append(f"mem {metrics['memory/peak_gib']:.1f}{of_memory} GiB")
    parts.append(f"eta {_duration((steps - step) * metrics['throughput/step_seconds'])}")
    return " ".join(parts)


def _thousands(value: float) -> str:
    """412300 -> 412.3k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.99995 * limit:  # 999,960 is 1.0M, not 1000.0k
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """34860 -> 9h41m; the two largest units."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"
