"""Pretrain a language model: `deepspeed launch/pretrain.py --config CONFIG.yaml [section.key=value ...]`.

The same under `torchrun --nproc-per-node N launch/pretrain.py ...`, and `python launch/pretrain.py ...` for one rank.
"""

import os
import sys
from contextlib import suppress

from dsmoe.launch.ancestry import watch_launcher

if __name__ == "__main__":
    watch_launcher()  # before the seconds that torch takes, in which the launcher may go

# When a rank dies, torch's C++ side warns about every closed socket with a page of stack frames. dsmoe says it once.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe.train.run import main

if __name__ == "__main__":
    code = main()
    with suppress(OSError):  # after a hangup there is nobody to read it
        sys.stdout.flush()
    # Not sys.exit: after a failure, destroying process groups whose peers are gone can wait for their timeout.
    os._exit(code) if code else sys.exit(code)
