"""`launch/pretrain.py`, but a rank also says when it begins to load a checkpoint."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
LOADING = "a rank loads "


def main() -> None:
    """Run it with the arguments of this program."""
    import torch

    from dsmoe.train import Trainer

    torch.manual_seed(0)  # dsmoe has generators of its own; torch's, which is saved too, begins anywhere
    resume = Trainer.resume

    def marked(trainer: Trainer, checkpoint: Path) -> None:
        os.write(1, f"{LOADING}{checkpoint}\n".encode())
        resume(trainer, checkpoint)

    Trainer.resume = marked  # type: ignore[method-assign]
    sys.argv = [str(PRETRAIN), *sys.argv[1:]]
    runpy.run_path(str(PRETRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
