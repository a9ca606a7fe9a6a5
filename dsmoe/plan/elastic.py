"""The same run on other devices than its config names: which degrees it takes there, and where it cannot go on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dsmoe.config.cross_field_checks import cross_field_problems
from dsmoe.config.dump import flatten
from dsmoe.config.errors import Problem, UserError
from dsmoe.config.schema import Config
from dsmoe.config.sections.parallel import world_size
from dsmoe.config.suggestions import divisors_of, join_or, neighbours

MOST_NODES = 4096
"""Most nodes among which the nearest valid number is sought."""
MOST_SEQUENCES = 65_536
"""The largest micro-batch that is tried in place of the config's."""
_LAYOUT_KEYS = ("cluster.", "parallel.", "train.batch_tokens", "train.micro_batch_size")
"""The keys of problems that other devices may have, or not have; others are if they name a degree."""
_DEGREE = re.compile(r"parallel\.(tensor|expert)")


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
    known = _known(config)
    fitted = _first_valid(config, nodes, devices_per_node, known)
    if fitted is not None:
        return fitted
    valid = [n for n in range(1, min(2 * nodes, MOST_NODES) + 1) if _first_valid(config, n, devices_per_node, known)]
    nearest = f"; nearest that can: {join_or(neighbours(nodes, valid))} nodes" if valid else ""
    problems = [
        problem for problem in cross_field_problems(_on(config, nodes, devices_per_node)) if problem not in known
    ]
    raise UserError(
        f"{nodes} nodes x {devices_per_node} devices cannot train this config with its batch "
        f"({'; '.join(message for _, message in problems)}){nearest}"
    )


def settings_for(config: Config, nodes: int, devices_per_node: int) -> tuple[list[str], list[str]]:
    """The overrides with which the config suits `nodes` x `devices_per_node` best, and what else has to change.

    They are the two numbers, and the degrees that `fit_to_world` would take. What is wrong with the config on any
    devices is not among the rest.
    """
    known, old = _known(config), flatten(config.model_dump())
    found: list[tuple[list[str], Config]] = []
    for choice in _choices(_on(config, nodes, devices_per_node)):
        found.append(
            ([message for key, message in cross_field_problems(choice) if (key, message) not in known], choice)
        )
        if not found[-1][0]:
            break
    problems, best = min(found, key=lambda tried: len(tried[0]))
    numbers = ("cluster.nodes", "cluster.devices_per_node")
    new = flatten(best.model_dump())
    changed = [key for key in new if old[key] != new[key] and key not in numbers]
    return [f"{key}={new[key]}" for key in (*numbers, *changed)], problems


def is_sound(config: Config) -> bool:
    """Return whether the config is right apart from its number of devices."""
    return not _known(config)


def has_layout(config: Config) -> bool:
    """Return whether the config's own devices can have its layout."""
    return all(problem in _known(config) for problem in cross_field_problems(config))


def _known(config: Config) -> set[Problem]:
    """The problems of the config that no number of devices mends."""
    problems = cross_field_problems(config)
    return {(key, text) for key, text in problems if not (key.startswith(_LAYOUT_KEYS) or _DEGREE.search(text))}


def adjustments(given: Config, fitted: Config) -> list[str]:
    """Describe the changes of `fit_to_world`: `parallel.expert 8 -> 4`."""
    old, new = flatten(given.model_dump()), flatten(fitted.model_dump())
    return [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]


def _first_valid(config: Config, nodes: int, devices_per_node: int, known: Collection[Problem]) -> Config | None:
    moved = _on(config, nodes, devices_per_node)
    return next((choice for choice in _choices(moved) if all(p in known for p in cross_field_problems(choice))), None)


def _on(config: Config, nodes: int, devices_per_node: int) -> Config:
    cluster = config.cluster.model_copy(update={"nodes": nodes, "devices_per_node": devices_per_node})
    return config.model_copy(update={"cluster": cluster})


def _choices(config: Config) -> Iterator[Config]:
    """Yield the configs to try, best first."""
    experts = config.parallel.expert
    divisors = divisors_of(config.moe.num_experts) if config.moe is not None else [1]
    below, above = [d for d in divisors if d < experts], [d for d in divisors if d > experts]
    exchanges = dict.fromkeys([config.parallel.all_to_all, "flat"])
    train = config.train.model_copy(update={"micro_batch_size": _micro_batch_size(config)})
    for expert in [experts, *reversed(below), *above]:
        for exchange in exchanges:
            parallel = config.parallel.model_copy(update={"expert": expert, "all_to_all": exchange})
            yield config.model_copy(update={"parallel": parallel, "train": train})


def _micro_batch_size(config: Config) -> int:
    """The largest size up to the config's of which whole ones make up the batch; its own where there is none."""
    train = config.train
    data, rest = divmod(world_size(config.cluster), config.parallel.tensor)
    sequences, more = divmod(train.batch_tokens, train.sequence_length * max(data, 1))
    if rest or more or sequences % train.micro_batch_size == 0:
        return train.micro_batch_size
    most = min(train.micro_batch_size, MOST_SEQUENCES)
    return next(size for size in range(most, 0, -1) if sequences % size == 0)
