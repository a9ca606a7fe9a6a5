"""`dsmoe.initialize`: prepare the data and make the engine for a user's own model and loop."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dsmoe.config.schema import Config
from dsmoe.data import PreparedSource, TrainLoader, prepare
from dsmoe.data.cache import VERIFIED_AT_START
from dsmoe.engine.deepspeed_config import accepted_by_deepspeed
from dsmoe.engine.make_engine import make_engine
from dsmoe.parallel.groups import Groups
from dsmoe.plan.plan import Plan
from dsmoe.runtime.consistency import check_all_ranks_agree
from dsmoe.runtime.processes import run_on_host_leaders, run_on_rank_0
from dsmoe.train.alike import data_fingerprint, run_fingerprint


def initialize(
    *, model: nn.Module, config: Config, groups: Groups, sources: Sequence[PreparedSource] | None = None
) -> tuple[deepspeed.DeepSpeedEngine, torch.optim.Optimizer, TrainLoader, LambdaLR]:
    """Wrap `model` for training by `config`.

    Collective: every rank calls it, with the same config but for paths, the same code and the same data, which are
    compared.

    Args:
        model: any module; its `dsmoe.MoE` layers exchange tokens over `groups`.
        config: the run.
        groups: this rank's process groups. What no tensor rank has a part of alone becomes the first one's on all.
        sources: the data, as `prepare_data` returns them; None prepares them.

    Returns:
        DeepSpeed's engine, with an `update_guard` (`dsmoe.engine.update_guard`); its optimizer; the training data; the
        learning-rate scheduler, which the engine steps.

    Raises:
        UserError: the config, the data or the model are wrong.
        RankMismatchError: ranks have other settings, code or data than rank 0.
    """
    check_all_ranks_agree(run_fingerprint(config))  # first: a rank with another tokenizer would make a cache of its own
    plan = Plan.from_config(config)
    settings = accepted_by_deepspeed(plan)  # before data that take hours are prepared
    sources = prepare_data(config) if sources is None else sources
    loader = TrainLoader(sources, config, groups.coordinate("data"), groups.topology.data)
    engine = make_engine(model, plan, groups, settings)
    return engine, engine.optimizer, loader, engine.lr_scheduler


def prepare_data(config: Config) -> list[PreparedSource]:
    """Prepare the data of `config`, tokenised by one rank while the others wait; collective.

    Where nodes do not share `data.cache_dir`, the first rank of each node makes its own, in its own time: nobody waits
    with a limit. That rank also looks whether the files are what was written (`prepare`'s `check`); the others check
    what they read.

    Raises:
        UserError: the data are wrong.
        RankMismatchError: ranks have other data than rank 0.
    """
    run_on_rank_0(lambda: len(prepare(config, VERIFIED_AT_START)), "preparing the data")
    run_on_host_leaders(lambda: len(prepare(config, VERIFIED_AT_START)), "preparing the data of each host")
    sources = prepare(config, check=0)
    check_all_ranks_agree(data_fingerprint(sources))
    return sources
