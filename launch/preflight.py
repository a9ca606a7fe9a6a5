"""Check every node and link before a long job: `deepspeed launch/preflight.py --config CONFIG [section.key=value ...]`.

Started as `launch/pretrain.py` is, by the same launcher with the same arguments. `dsmoe preflight CONFIG` is the same.
"""

import os

from dsmoe.launch.ancestry import watch_launcher

if __name__ == "__main__":
    watch_launcher()

# As in pretrain.py: what torch says of closed sockets would bury what dsmoe says of the rank that closed them.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe.preflight.run import end_process, main

if __name__ == "__main__":
    end_process(main())
