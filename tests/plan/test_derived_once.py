"""Every quantity that follows from a config is derived in one place, and handed down in a `Plan`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.sources import sources

DERIVED_IN = {
    "Batch.from_config": {"dsmoe/plan/plan.py"},
    "Topology.from_config": {"dsmoe/plan/batch.py"},
    "count_parameters": {"dsmoe/plan/plan.py"},
    "flops_per_token": {"dsmoe/plan/plan.py"},
    "resolve_device": {"dsmoe/plan/plan.py", "dsmoe/plan/devices.py"},  # there to check it, before there is a plan
    "Meter": {"dsmoe/train/trainer.py"},
    "Groups": {"dsmoe/train/run.py", "dsmoe/parity/training.py", "dsmoe/preflight/stages.py"},
    "make_engine": {"dsmoe/train/trainer.py", "dsmoe/train/initialize.py"},
    "prepare_data": {"dsmoe/train/run.py", "dsmoe/train/initialize.py", "dsmoe/parity/training.py"},
}
"""The files that may call each constructor or derivation; each of them once."""

PLANS_OF = {
    "dsmoe/cli/config_commands.py": "`dsmoe config check`",
    "dsmoe/cli/launch_commands.py": "`dsmoe plan` and `dsmoe launch`, one each",
    "dsmoe/interop/logits.py": "a checkpoint that is exported, whose size is compared with the memory",
    "dsmoe/parity/check_parity.py": "each layout that is compared",
    "dsmoe/runtime/world.py": "the ranks that a launcher has started: `pretrain` and `preflight`",
    "dsmoe/train/initialize.py": "`dsmoe.initialize`, which users call with a config",
}
"""Who begins with a config, and so makes a plan of it."""


def calls(text: str) -> Iterator[str]:
    """The names of what is called, with the class where it is a class's method: `f`, `C.f`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                yield function.id
            elif isinstance(function, ast.Attribute):
                yield function.attr
                if isinstance(function.value, ast.Name):
                    yield f"{function.value.id}.{function.attr}"


def called_in(name: str) -> dict[str, int]:
    """How often each file of the package calls `name`; files that do not are left out."""
    counts = {file: list(calls(text)).count(name) for file, text in sources("dsmoe").items()}
    return {file: count for file, count in counts.items() if count}


def test_each_quantity_is_derived_in_one_place() -> None:
    for name, files in DERIVED_IN.items():
        assert called_in(name) == dict.fromkeys(files, 1), name


def test_plans_are_made_where_a_config_comes_in() -> None:
    assert called_in("Plan.from_config") == {**dict.fromkeys(PLANS_OF, 1), "dsmoe/cli/launch_commands.py": 2}


def test_a_second_derivation_would_be_seen() -> None:
    text = "batch = Batch.from_config(config)\nplan.count_parameters(config)\nfor x in y: Groups(z)\n"
    assert {"Batch.from_config", "count_parameters", "Groups"} <= set(calls(text))
