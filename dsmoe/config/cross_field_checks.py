"""Cross-field checks: all rules between keys that are valid one by one, for any machine.

Each rule is defined beside the section it is about. Every message names the keys, their values and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from dsmoe.config.deepspeed import deepspeed_problems
from dsmoe.config.errors import Problem
from dsmoe.config.partial_config import InvalidKeyError
from dsmoe.config.schema import Config, Moe
from dsmoe.config.sections import checkpoint, data, model, moe, observe, optimizer, parallel, train

Rule = Callable[[Config], Iterable[Problem]]


def cross_field_problems(config: Config) -> list[Problem]:
    """Return every contradiction between keys of a config.

    In a `valid_part`, a rule is skipped as soon as it reads a key that is wrong or missing.
    """
    problems: list[Problem] = []
    for rule in _RULES:
        with suppress(InvalidKeyError):
            problems.extend(rule(config))
    return problems


def _if_moe(rule: Callable[[Config, Moe], Iterable[Problem]]) -> Rule:
    """Return a rule for all configs that does nothing where `moe` is null."""
    return lambda c: () if c.moe is None else rule(c, c.moe)


_RULES: tuple[Rule, ...] = (
    lambda c: parallel.tensor_degree_problems(c.cluster, c.parallel),
    lambda c: parallel.sequence_problems(c.parallel),
    lambda c: parallel.tensor_slice_problems(c.parallel, c.model, c.train),
    _if_moe(lambda c, m: moe.dense_path_slice_problems(m, c.parallel.tensor)),
    lambda c: parallel.spread_problems(c.cluster, c.parallel, c.moe),
    lambda c: parallel.expert_degree_problems(c.cluster, c.parallel),
    lambda c: parallel.exchange_problems(c.cluster, c.parallel),
    lambda c: model.attention_problems(c.model),
    lambda c: model.layer_problems(c.model, c.moe),
    _if_moe(lambda _, m: moe.choice_problems(m.num_experts, m.top_k, m.router)),
    _if_moe(lambda _, m: moe.dense_path_problems(m)),
    _if_moe(lambda c, m: moe.row_problems(c.model.hidden_size, m.expert_ffn_size, c.parallel.expert_tensor)),
    _if_moe(lambda _, m: moe.causal_problems(m.router)),
    _if_moe(lambda _, m: moe.expert_choice_problems(m.router, m.balance, m.capacity)),
    _if_moe(lambda _, m: moe.group_problems(m.num_experts, m.top_k, m.router)),
    _if_moe(lambda _, m: moe.capacity_problems(m.capacity)),
    lambda c: data.source_problems(c.data),
    lambda c: data.tokenizer_problems(c.data, c.model),
    lambda c: optimizer.learning_rate_problems(c.optimizer),
    lambda c: optimizer.offload_problems(c.optimizer, c.parallel),
    lambda c: optimizer.schedule_problems(c.optimizer, c.train),
    lambda c: train.length_problems(c.train, c.model),
    lambda c: train.batch_problems(c.train, c.cluster, c.parallel),
    lambda c: train.evaluation_problems(c.train),
    lambda c: checkpoint.kept_problems(c.checkpoint, c.train),
    lambda c: observe.interval_problems(c.observe),
    deepspeed_problems,
)
