"""What `environment.json` records, and what it must not."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from dsmoe.preflight.stages import steering
from dsmoe.train.environment import of_this_rank, worth_recording, write_environment


def test_variables_that_decide_how_ranks_meet_are_recorded() -> None:
    wanted = {
        "FI_PROVIDER": "efa",
        "GLOO_SOCKET_IFNAME": "eth0",
        "MASTER_ADDR": "n1",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_PKEY": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": "/home/monkey/tokens",
    }
    assert worth_recording({**wanted, "HOME": "/root", "WANDB_PROJECT": "x"}) == wanted
    assert steering(wanted).keys() == {"FI_PROVIDER", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_PKEY"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_JWT", "eyJhbGciOiJIUzI1NiJ9"),
        ("SLURM_EXPORT_ENV", "ALL,WANDB_API_KEY=5f3"),
        ("DS_HUB_TOKEN", "hf_x"),
        ("TORCH_STORE_PASSWORD", "x"),
        ("DEEPSPEED_AUTH", "x"),
        ("DS_MIRROR", "https://user:word@example.org/simple"),
        ("SLURM_JOB_COMMENT", "my word"),
        ("SLURM_SPANK_X", "anything"),
        ("DS_URL", "https://example.org/?sig=s3cr3t"),
        ("DS_HEADER", "Bearer abc"),
        ("DS_LOGIN", "hf_abc"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        # None of these has a name or a value by which one could know.
        ("SLURM_HUB_LOGIN", "monkey-7f3a"),
        ("DS_STORE", "7f3a9c"),
        ("TORCH_HUB_LICENCE", "7f3a9c"),
        ("NCCL_PLUGIN_CONFIG", "7f3a9c"),
        ("UCX_PIN", "1234"),
        ("OMP_ANYTHING", "7f3a9c"),
        ("CUDA_REGISTRY", "7f3a9c"),
        ("FI_OPX_PHRASE", "7f3a9c"),
        ("MASTER_PHRASE", "7f3a9c"),
        ("LD_LIBRARY_PATH_PHRASE", "7f3a9c"),
        ("DEEPSPEED_SERVICE", "7f3a9c"),
        ("NCCL_NET", "https://monkey:7f3a9c@example.org"),
        ("MASTER_ADDR", "monkey:7f3a9c@example.org"),
        ("NCCL_SECRET_TOKEN", "7f3a9c"),
        ("FI_CXI_AUTH_KEY", "7f3a9c"),
        ("UCX_PASSWORD", "7f3a9c"),
    ],
)
def test_a_secret_is_not(name: str, value: str) -> None:
    assert worth_recording({name: value}) == {}
    assert steering({name: value}) == {}


def test_hosts_are_listed_with_their_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JWT", "eyJhbGciOiJIUzI1NiJ9")
    write_environment(tmp_path, {"a": 1}, [("n1", "H100"), ("n1", "H100"), ("n2", "H100")])
    text = (tmp_path / "environment.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    assert facts["hosts"] == {
        "n1": {"ranks": [0, 1], "devices": ["H100"] * 2},
        "n2": {"ranks": [2], "devices": ["H100"]},
    }
    assert (facts["launcher"], facts["world_size"], facts["cuda"]) == ("python alone", 3, None)
    assert facts["interfaces"]["lo"][0] == "127.0.0.1"
    assert "eyJ" not in text
    assert json.loads((tmp_path / "ds_config.json").read_text(encoding="utf-8")) == {"a": 1}
    assert of_this_rank() == (socket.gethostname(), "cpu")
