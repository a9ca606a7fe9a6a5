"""Compile Triton's C module while the image is built, where a compiler is but no GPU: `triton_module.py FOLDER`.

Triton does it before the first kernel of every user; docker/no_compiler hands out what is made here. Nothing is made
where torch's build has no Triton (CPU).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def main(folder: Path) -> None:
    """Write `cuda_utils.so` into the folder, which is made."""
    folder.mkdir(parents=True)
    if importlib.util.find_spec("triton") is None:
        return
    from triton.backends.nvidia.driver import dirname, include_dirs

    headers = [f"-I{path}" for path in (*include_dirs, sysconfig.get_paths()["include"])]
    with tempfile.TemporaryDirectory() as scratch:
        # The driver's library is the running machine's. Here its name is enough, which the module asks for when it is
        # loaded: some compilers leave out the names of libraries from which they use nothing.
        driver = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null", "-o", f"{scratch}/libcuda.so.1"]
        subprocess.run(driver, check=True)
        link = ["-Wl,--no-as-needed", f"-L{scratch}", "-l:libcuda.so.1", "-o", f"{folder}/cuda_utils.so"]
        options = ["-O3", "-shared", "-fPIC", "-Wno-psabi"]
        subprocess.run(["gcc", *options, f"{dirname}/driver.c", *headers, *link], check=True)


main(Path(sys.argv[1]))
