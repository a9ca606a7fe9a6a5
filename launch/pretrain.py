"""Pretrain a language model: `deepspeed launch/pretrain.py --config CONFIG.yaml [section.key=value ...]`.

The same under `torchrun --nproc-per-node N launch/pretrain.py ...`, and `python launch/pretrain.py ...` for one rank.
"""

import os

# When a rank dies, torch's C++ side warns about every closed socket with a page of stack frames. dsmoe says it once.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe.runtime.launcher_exit import watch_launcher
from dsmoe.runtime.start import begin, exit_process, interruptible, pretrain_parser

if __name__ == "__main__":
    watch_launcher()
    with interruptible():
        start = begin(pretrain_parser())
        code = start.ended()
        if code is None:
            from dsmoe.train.run import main  # which imports torch

            code = main(start)
    exit_process(code)
