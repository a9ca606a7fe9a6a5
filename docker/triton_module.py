"""Compile Triton's C module while the image is built, where a compiler is but no GPU: `triton_module.py FOLDER`.

Triton does it before the first kernel of every user; docker/no_compiler hands out what is made here. Nothing is made
where torch's build has no Triton (CPU).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path


def main(folder: Path) -> None:
    """Write `cuda_utils.so` into the folder, which is made."""
    folder.mkdir(parents=True)
    if importlib.util.find_spec("triton") is None:
        return
    from triton.backends.nvidia import driver
    from triton.runtime.build import _build

    # The driver's library is the running machine's. The linker asks only that one of its name is there.
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["gcc", "-shared", "-o", f"{scratch}/libcuda.so.1", "-x", "c", "/dev/null"], check=True)
        source = Path(driver.dirname, "driver.c")
        made = _build(
            "cuda_utils",
            str(source),
            scratch,
            [driver.libdevice_dir, scratch],
            driver.include_dirs,
            driver.libraries,
            [],
        )
        (folder / "cuda_utils.so").write_bytes(Path(made).read_bytes())


main(Path(sys.argv[1]))
