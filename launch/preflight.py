"""Check every node and link before a long job: `deepspeed launch/preflight.py --config CONFIG [section.key=value ...]`.

Started as `launch/pretrain.py` is, by the same launcher with the same arguments. `dsmoe preflight CONFIG` is the same.
"""

import os

# As in pretrain.py: what torch says of closed sockets would bury what dsmoe says of the rank that closed them.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe.runtime.launcher_exit import watch_launcher
from dsmoe.runtime.start import begin, exit_process, interruptible, preflight_parser

if __name__ == "__main__":
    watch_launcher()
    with interruptible():
        start = begin(preflight_parser())
        code = start.ended()
        if code is None:
            from dsmoe.preflight.check_nodes import main  # which imports torch

            code = main(start)
    exit_process(code)
