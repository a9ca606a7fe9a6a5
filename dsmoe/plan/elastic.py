"""The same run on other devices than its config names: which degrees it takes there, and where it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe.config.checks import cross_field_problems
from dsmoe.config.errors import UserError
from dsmoe.config.nearest import divisors_of, either, neighbours
from dsmoe.config.schema import Config
from dsmoe.config.show import flatten

MOST_NODES = 4096
"""How far the nearest number of nodes is looked for."""


def fit_to_world(config: Config, nodes: int, devices_per_node: int) -> Config:
    """The config with the degrees that suit `nodes` x `devices_per_node`, and the batch that it has.

    What one device holds of a dense weight stays: `parallel.tensor` and `expert_tensor`. `parallel.expert` stays if it
    can, else becomes the largest degree below it that the experts and the devices allow (more experts on each), else
    the next above. `train.micro_batch_size` stays if whole micro-batches of it make up the batch, else becomes the next
    smaller that does; then more of them are accumulated, and a balancing loss of scope `micro_batch` counts over fewer
    tokens. `parallel.all_to_all` becomes flat where there are not two levels.

    Raises:
        UserError: nothing of that suits; names the nearest numbers of nodes that do.
    """
    if (nodes, devices_per_node) == (config.cluster.nodes, config.cluster.devices_per_node):
        return config
    fitted = _first_valid(config, nodes, devices_per_node)
    if fitted is not None:
        return fitted
    valid = [n for n in range(1, min(2 * nodes, MOST_NODES) + 1) if _first_valid(config, n, devices_per_node)]
    nearest = f"; nearest that can: {either(neighbours(nodes, valid))} nodes" if valid else ""
    problems = cross_field_problems(_on(config, nodes, devices_per_node))
    raise UserError(
        f"{nodes} nodes x {devices_per_node} devices cannot train this config with its batch "
        f"({'; '.join(message for _, message in problems)}){nearest}"
    )


def adjustments(given: Config, fitted: Config) -> list[str]:
    """What `fit_to_world` has changed: `parallel.expert 8 -> 4`."""
    old, new = flatten(given.model_dump()), flatten(fitted.model_dump())
    return [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]


def _first_valid(config: Config, nodes: int, devices_per_node: int) -> Config | None:
    here = _on(config, nodes, devices_per_node)
    return next((choice for choice in _choices(here) if not cross_field_problems(choice)), None)


def _on(config: Config, nodes: int, devices_per_node: int) -> Config:
    cluster = config.cluster.model_copy(update={"nodes": nodes, "devices_per_node": devices_per_node})
    return config.model_copy(update={"cluster": cluster})


def _choices(config: Config) -> Iterator[Config]:
    """What could be tried, best first."""
    experts = config.parallel.expert
    divisors = divisors_of(config.moe.num_experts) if config.moe is not None else [1]
    below, above = [d for d in divisors if d < experts], [d for d in divisors if d > experts]
    exchanges = dict.fromkeys([config.parallel.all_to_all, "flat"])
    for expert in [experts, *reversed(below), *above]:
        for exchange in exchanges:
            parallel = config.parallel.model_copy(update={"expert": expert, "all_to_all": exchange})
            for size in reversed(range(1, config.train.micro_batch_size + 1)):
                train = config.train.model_copy(update={"micro_batch_size": size})
                yield config.model_copy(update={"parallel": parallel, "train": train})
