"""Host lists as Slurm writes them."""

from __future__ import annotations

import pytest

from dsmoe.config.errors import UserError
from dsmoe.runtime.nodelist import expand_nodelist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("login,gpu-07.example.org", ["login", "gpu-07.example.org"]),
        ("n[01-03,07],m2", ["n01", "n02", "n03", "n07", "m2"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]x", ["n098x", "n099x", "n100x", "n101x"]),
        ("n[5,3]", ["n5", "n3"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("10.0.0.[9-10]", ["10.0.0.9", "10.0.0.10"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_a_list_becomes_its_names(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        "n1,,n2",
        "n1,",
        "n[1-",
        "n1]",
        "n[]",
        "n[3-1]",
        "n[a-b]",
        "n[1-2-3]",
        "n 1",
        "n[1[2]]",
        "n;m",
        "$(n)",
        "-x[1-8]",
        "n1,-x",
    ],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a list of hosts"):
        expand_nodelist(text)


@pytest.mark.parametrize("text", ["n[1-99999999]", "n[1-1000]r[1-1000]"])
def test_a_mistyped_number_is_refused_at_once(text: str) -> None:
    with pytest.raises(UserError, match="more than 100,000 hosts"):
        expand_nodelist(text)
