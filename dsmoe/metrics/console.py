"""The console line: one log step in figures that a person watches."""

from __future__ import annotations

from collections.abc import Mapping

from dsmoe.metrics import definitions as metric


def console_line(metrics: Mapping[str, float], step: int, steps: int, memory_gib: float | None) -> str:
    """Return `step 120/20000 0.6% loss 7.0412 gnorm 0.84 lr 2.40e-04 ...`, without figures that `metrics` lacks.

    Args:
        metrics: the metrics of a training line, by name.
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        memory_gib: memory of a device in GiB, None where unknown.
    """
    loss, norm, rate = (metrics[each.name] for each in (metric.TRAIN_LOSS, metric.OPTIM_GRAD_NORM, metric.OPTIM_LR))
    parts = [f"step {step}/{steps} {100 * step / steps:.1f}%", f"loss {loss:.4f} gnorm {norm:.2f} lr {rate:.2e}"]
    if metric.MOE_BALANCE_LOSS.name in metrics:
        balance, dropped = metrics[metric.MOE_BALANCE_LOSS.name], metrics[metric.MOE_DROPPED_PERCENT.name]
        load = metrics[metric.MOE_LOAD_MAX_OVER_MEAN.name]
        parts.append(f"bal {balance:.3f} drop {dropped:.2f}% max/mean {load:.2f}")
    parts.append(f"{_thousands(metrics[metric.THROUGHPUT_TOKENS_PER_SECOND.name])} tok/s")
    if metric.THROUGHPUT_MFU_PERCENT.name in metrics:
        full, causal = metric.THROUGHPUT_MFU_PERCENT.name, metric.THROUGHPUT_MFU_PERCENT_CAUSAL.name
        parts.append(f"MFU {metrics[full]:.1f}% (causal {metrics[causal]:.1f}%)")
    device_memory = f"/{memory_gib:.1f}" if memory_gib else ""
    parts.append(f"mem {metrics[metric.MEMORY_PEAK_GIB.name]:.1f}{device_memory} GiB")
    parts.append(f"eta {_duration((steps - step) * metrics[metric.THROUGHPUT_STEP_SECONDS.name])}")
    return " ".join(parts)


def _thousands(value: float) -> str:
    """Return a number in thousands, millions or billions: 412300 is 412.3k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.99995 * limit:  # 999,960 is 1.0M, not 1000.0k
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """Return the two largest units: 34860 s is 9h41m."""
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
