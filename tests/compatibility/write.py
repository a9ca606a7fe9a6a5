"""Make the files in `data/` that dsmoe writes: `python -m tests.compatibility.write FOLDER`.

They were made at commit 2ebf307, before the code was rebuilt, from the YAML files and the text in `data/yaml`, and stay
as they are: a later version has to read what that one wrote. For a new kind of file, add what makes it here, and its
files to those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsmoe.cli import main as command
from tests.helpers.stored_files import (
    FINISHED,
    HUGGING_FACE,
    RUNS,
    VARIABLES,
    copy_for,
    fixed_tokens,
    resolved,
    said_of_run,
    start,
    yaml_files,
)

LEFT_OUT = ("environment.json", "failures")
"""Of a run's folder: they tell of the machine, and no start reads them."""


def write(out: Path) -> None:
    """Write everything into the folder `out`."""
    with tempfile.TemporaryDirectory(prefix="dsmoe_compatibility_") as folder:
        work = copy_for(Path(folder))
        for name, ranks in RUNS.items():
            start(work, ranks, f"yaml/{name}.yaml")
            shutil.rmtree(work / "runs" / name / "checkpoints" / "step_00000005")
        start(work, 1, f"yaml/{FINISHED}.yaml")
        shutil.copytree(work / "runs", out / "run_folders", ignore=shutil.ignore_patterns(*LEFT_OUT))
        said = said_of_run(start(work, 1, f"yaml/{FINISHED}.yaml").out)
        (out / "said_when_finished.txt").write_text(said, encoding="utf-8")
        export(work, out / "hugging_face")
        os.environ.update(VARIABLES)
        _write_json(out / "resolved.json", {name: resolved(name, work) for name in yaml_files()})


def export(work: Path, out: Path) -> None:
    """Export the checkpoints, one in fp32 and the others in bf16, and store the losses of transformers' models."""
    import transformers

    losses = {}
    for architecture, run in HUGGING_FACE.items():
        folder = out / architecture
        folder.parent.mkdir(parents=True, exist_ok=True)
        dtype = "fp32" if architecture == "mixtral" else "bf16"
        path = work / "runs" / run
        code = command(["checkpoint", "export", str(path), str(folder), "--format", architecture, "--dtype", dtype])
        assert code == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = fixed_tokens(model.config.vocab_size)
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        losses[architecture] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    _write_json(out / "losses.json", losses)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the files are written there")
    write(parser.parse_args().folder)
