"""Manifests that agree with their own checksum and are wrong: refused by themselves, or by what is in the files."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe.checkpoint.compatibility import check_fits
from dsmoe.checkpoint.folder import candidates, verify
from dsmoe.checkpoint.manifest import DamagedError, Manifest, _sealed, tiles
from dsmoe.cli import main
from dsmoe.config import UserError
from dsmoe.config.schema import Config
from dsmoe.engine.optimizer_state import fragments, inner_optimizer
from dsmoe.interop.tensors import checkpoint_tensors
from dsmoe.plan.plan import Plan
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train import Trainer
from dsmoe.train.run_folder import check_run_folder
from tests.helpers.checkpoint_runs import layout_config, take_steps
from tests.helpers.hugging_face_models import LLAMA, MIXTRAL, make_config, save
from tests.helpers.small_runs import make_trainer

Content = dict[str, Any]
NORM, EMBEDDING = "model/norm.weight", "model/embedding.weight"
PAIR = ("model/blocks.0.attention_norm.weight", "model/blocks.0.ffn_norm.weight")
"""Of one shape and type."""
FILE = "rank_00000_000.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifests")
    save(make_config(folder, MIXTRAL), folder / "step_00000000")
    return folder / "step_00000000"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def content_of(checkpoint: Path) -> Content:
    content = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    del content["sha256"]
    return dict(content)


def seal(checkpoint: Path, content: Content) -> None:
    (checkpoint / "manifest.json").write_text(_sealed(content), encoding="utf-8")


def box(content: Content, key: str = NORM) -> list[Any]:
    return list(content["tensors"][key][2])


def swap(content: Content, *places: int) -> None:
    for place in places:
        one, other = (content["tensors"][key][2][0] for key in PAIR)
        one[place], other[place] = other[place], one[place]


def set_in(*path: Any) -> Callable[[Content], None]:
    """Put the last argument at the place that the others lead to."""
    *way, last, value = path

    def change(content: Content) -> None:
        holder: Any = content
        for part in way:
            holder = holder[part]
        holder[last] = value

    return change


def nested(levels: int, around: Callable[[Any], Any] = lambda inner: {"a": inner}) -> Any:
    """Nest None in so many levels."""
    value: Any = None
    for _ in range(levels):
        value = around(value)
    return value


FIRST = ("tensors", NORM, 2, 0)
WRONG: dict[str, Callable[[Content], None]] = {
    "another tensor's elements": lambda c: swap(c, 3),
    "one tensor twice": lambda c: c["tensors"][PAIR[0]][2].__setitem__(0, box(c, PAIR[1])[0]),
    "another name": lambda c: c["tensors"].update({"model/other.weight": c["tensors"].pop(NORM)}),
    "two names for one": lambda c: c["tensors"].update({"model/other.weight": c["tensors"][NORM]}),
    "swapped names": lambda c: c["tensors"].update({PAIR[0]: c["tensors"][PAIR[1]], PAIR[1]: c["tensors"][PAIR[0]]}),
    "a tensor less": lambda c: c["tensors"].pop(NORM),
    "no tensors": set_in("tensors", {}),
    "another type of the same size": set_in("tensors", NORM, 0, "I32"),
    "a transposed shape": lambda c: (
        c["tensors"][EMBEDDING][1].reverse(),
        c["tensors"][EMBEDDING][2][0][1].reverse(),
    ),
    "an offset within": lambda c: c["tensors"][NORM][2][0].__setitem__(3, box(c)[0][3] + 4),
    "the header's bytes": set_in(*FIRST, 3, 8),
    "a negative offset": set_in(*FIRST, 3, -8),
    "an offset behind the file": set_in(*FIRST, 3, 1 << 40),
    "a huge offset": set_in(*FIRST, 3, 10**4000),
    "an offset of text": set_in(*FIRST, 3, "8"),
    "an offset of a fraction": set_in(*FIRST, 3, 8.5),
    "a whole float": lambda c: c["tensors"][NORM][2][0].__setitem__(3, float(box(c)[0][3])),
    "an offset of null": set_in(*FIRST, 3, None),
    "a bool": set_in(*FIRST, 0, [False]),
    "a start of text": set_in(*FIRST, 0, "0"),
    "a nested start": set_in(*FIRST, 0, [[0]]),
    "a negative start": set_in(*FIRST, 0, [-1]),
    "another dimension": lambda c: (c["tensors"][NORM][2][0][0].append(0), c["tensors"][NORM][2][0][1].append(1)),
    "no boxes": set_in("tensors", NORM, 2, []),
    "a box twice": lambda c: c["tensors"][NORM][2].append(box(c)[0]),
    "a hole": lambda c: c["tensors"][NORM][2][0][1].__setitem__(0, 1),
    "nothing": lambda c: (c["tensors"][NORM][1].__setitem__(0, 0), c["tensors"][NORM][2][0][1].__setitem__(0, 0)),
    "a huge shape": set_in("tensors", NORM, 1, [1 << 62, 1 << 62]),
    "a million dimensions": set_in("tensors", NORM, 1, [1] * 1_000_000),
    "a longer tensor": lambda c: (
        c["tensors"][NORM][1].__setitem__(0, 64),
        c["tensors"][NORM][2][0][1].__setitem__(0, 64),
    ),
    "an unknown type": set_in("tensors", NORM, 0, "F8"),
    "a type that is none": set_in("tensors", NORM, 0, ["F32"]),
    "a tensor of text": set_in("tensors", NORM, "abc"),
    "another file": set_in(*FIRST, 2, "rank_00001_000.safetensors"),
    "a path": set_in(*FIRST, 2, f"../step_00000000/{FILE}"),
    "a file that is a list": set_in(*FIRST, 2, [FILE]),
    "a file elsewhere": lambda c: c["files"].update({f"../{FILE}": c["files"].pop(FILE)}),
    "other digits": lambda c: c["files"].update(
        {"rank_\u0660\u0660\u0660\u0660\u0660_000.safetensors": c["files"].pop(FILE)}
    ),
    "a size of text": lambda c: c["files"][FILE].update(bytes=str(c["files"][FILE]["bytes"])),
    "a size of a float": lambda c: c["files"][FILE].update(bytes=float(c["files"][FILE]["bytes"])),
    "a checksum that is none": lambda c: c["files"][FILE].update(xxh128=1),
    "a further field of a file": lambda c: c["files"][FILE].update(mode=7),
    "a step of text": set_in("facts", "step", "0"),
    "a negative step": set_in("facts", "step", -1),
    "a huge step": set_in("facts", "step", 10**4000),
    "a fraction of a step": set_in("facts", "step", 0.0),
    "another step": set_in("facts", "step", 3),
    "a step of the schedule too many": set_in("facts", "schedule_step", 3),
    "more steps skipped than there were": lambda c: c["facts"].update(skipped_steps=99, schedule_step=0),
    "a skipped step that advanced the schedule": lambda c: c["facts"].update(skipped_steps=0, schedule_step=1),
    "tokens of no number of steps": set_in("facts", "tokens", 7),
    "a loss that is no number": set_in("facts", "validation_loss", math.nan),
    "an infinite loss": set_in("facts", "validation_loss", math.inf),
    "a negative loss": set_in("facts", "validation_loss", -1.0),
    "a deep config": lambda c: c["facts"]["config"].update(deepspeed=nested(900)),
    "a deep list": lambda c: c["facts"].update(order={"texts": nested(100, lambda inner: [inner])}),
    "no tokens": lambda c: c["facts"].pop("tokens"),
    "a loss of text": set_in("facts", "validation_loss", "low"),
    "a config that is a list": set_in("facts", "config", []),
    "a config without a model": lambda c: c["facts"]["config"].pop("model"),
    "a model without a width": lambda c: c["facts"]["config"]["model"].pop("hidden_size"),
    "a layout of text": set_in("facts", "layout", "one"),
    "corpora of text": set_in("facts", "corpora", {"a": "b"}),
    "a further fact": set_in("facts", "code", "x"),
    "a further entry": set_in("code", "x"),
    "facts that are a list": set_in("facts", []),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sealed_but_wrong_manifest_is_refused_in_one_line(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = content_of(checkpoint)
    WRONG[name](content)
    seal(checkpoint, content)
    begun = time.process_time()
    if name != "a model without a width":  # every file is what was written, and the config is read by who wants it
        assert main(["checkpoint", "verify", str(checkpoint)]) == 2
        error = capsys.readouterr().err
        assert str(checkpoint) in error
        assert error.count("\n") == 1
        assert len(error) < 1000
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "out"), "--no-check"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()
    assert time.process_time() - begun < 10  # not for ever; a test of the machine's speed it is not


def test_what_is_right_is_accepted_sealed_anew(checkpoint: Path) -> None:
    seal(checkpoint, content_of(checkpoint))
    assert verify(checkpoint).facts.step == 0


def test_a_number_that_nothing_else_tells_is_sealed(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    text = path.read_text(encoding="utf-8")
    assert text.count('"skipped_steps": 0') == 1
    path.write_text(text.replace('"skipped_steps": 0', '"skipped_steps": 1'), encoding="utf-8")
    with pytest.raises(DamagedError, match=r"is damaged: it is not what was written"):
        verify(checkpoint)


ESCAPES = "x\x1b[2J\nstep 9, 1 B tokens\r\u2028\x85"
"""Wipes a terminal, and adds a line."""


@pytest.mark.parametrize(
    "change",
    [
        set_in("facts", "config", "name", ESCAPES),
        set_in("facts", "optimizer", ESCAPES),
        set_in("facts", "layout", {ESCAPES: ESCAPES}),
        set_in("facts", "versions", {ESCAPES: ESCAPES}),
        set_in("facts", "config", "model", "init_std", ESCAPES),
        set_in("tensors", f"exp_avg/{ESCAPES}", ["F16", [1], []]),
        set_in("tensors", f"buffer/{ESCAPES}", ["F8", [1], []]),
        lambda c: c["tensors"].update({f"model/{ESCAPES}": c["tensors"].pop(NORM)}),
    ],
)
def test_what_a_checkpoint_says_commands_no_terminal(
    change: Callable[[Content], None], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for changes in (lambda c: None, change):
        content = content_of(checkpoint)
        changes(content)
        seal(checkpoint, content)
        printed = []
        for command in (["show", "--tensors"], ["verify"], ["show", "--against", str(checkpoint)]):
            main(["checkpoint", command[0], str(checkpoint), *command[1:]])
            out, err = capsys.readouterr()
            printed += [*out.split("\n"), *err.split("\n")]
        other = make_config(checkpoint.parent, LLAMA)
        with pytest.raises(UserError) as error:
            check_fits(checkpoint, Manifest.read(checkpoint), other.model_dump(mode="json"), None)
        printed += str(error.value).split("\n")
        assert all(line.isprintable() for line in printed), printed
        lines.append(len(printed))
    assert lines[1] <= lines[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", FILE])
def test_a_pipe_in_a_files_place_is_not_waited_for(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / name
    path.unlink()
    os.mkfifo(path)
    for command in (["show"], ["verify"], ["export", str(tmp_path / "out"), "--no-check"]):
        assert main(["checkpoint", command[0], str(checkpoint), *command[1:]]) == 2
        assert f"{path} is a pipe, not a file" in capsys.readouterr().err
    found, passed_over = candidates(checkpoint.parent)
    assert (found, len(passed_over)) == ([], 1)
    with pytest.raises(UserError, match="is a pipe"):
        check_run_folder(Plan.from_config(make_config(tmp_path, MIXTRAL, checkpoint={"resume": str(checkpoint)})))


def test_a_header_that_says_something_else_than_the_manifest_is_found(checkpoint: Path) -> None:
    """Names in a file's header are exchanged, and the checksums made anew."""
    from xxhash import xxh3_128

    path, content = checkpoint / FILE, content_of(checkpoint)
    one, other = (f'"{key}[0]"'.encode() for key in PAIR)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = data[8:length].rstrip().replace(one, b'"@"').replace(other, one).replace(b'"@"', other)
    path.write_bytes(data[:8] + header.ljust(length - 8) + data[length:])
    content["files"][FILE]["xxh128"] = xxh3_128(path.read_bytes()).hexdigest()
    seal(checkpoint, content)
    with pytest.raises(DamagedError, match=r"in the file's own header"):
        verify(checkpoint)


def test_many_boxes_are_checked_in_linear_time() -> None:
    """Every two of the 200,000 have their rows in common: each compared with each would take an hour."""
    count = 200_000
    boxes = [((0, column), (7, 1)) for column in range(count)]
    assert tiles((7, count), boxes)
    boxes[1] = ((0, 0), (7, 1))
    assert not tiles((7, count), boxes)


def numbers_in(holder: Any) -> list[tuple[Any, Any]]:
    """Return every place in the tree that holds a leaf."""
    items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
    found = []
    for key, value in items:
        found += numbers_in(value) if isinstance(value, dict | list) and value else [(holder, key)]
    return found


def mutate(content: Content, draw: random.Random) -> None:
    """Change one or two leaves, or move, drop or double whole entries."""
    for _ in range(draw.choice([1, 1, 1, 2])):
        part = draw.choice(["facts", "files", "tensors", "tensors", "tensors"])
        holder, key = draw.choice(numbers_in(content[part]))
        value = holder[key]
        kind = draw.choice(["type", "near", "far", "other", "drop", "double", "swap"])
        if kind == "type":
            holder[key] = draw.choice(
                [None, "x", 1.5, True, [], {}, -1, 10**30, [value], str(value), math.inf, math.nan]
            )
        elif kind == "near" and type(value) is int:
            holder[key] = value + draw.choice([-8, -4, -1, 1, 4, 64])
        elif kind == "far" and type(value) is int:
            holder[key] = draw.choice([0, -value, value * 2, value << 40, draw.randrange(1 << 16)])
        elif kind == "other":
            source, place = draw.choice(numbers_in(content[part]))
            holder[key] = copy.deepcopy(source[place])
        elif kind == "drop" and isinstance(holder, dict):
            del holder[key]
        elif kind == "drop":
            holder.pop(key)
        elif kind == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(value))
        elif kind == "swap":
            names = draw.sample(sorted(content["tensors"]), 2)
            one, other = (content["tensors"][name] for name in names)
            place = draw.randrange(3)
            if len(one) == len(other) == 3:  # an earlier change may have made it shorter
                one[place], other[place] = other[place], one[place]


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.fuzz)])
def test_fuzz_manifests(count: int, checkpoint: Path) -> None:
    """Refused with DamagedError, or the tensors are the ones that were written; nothing else."""
    draw = random.Random(21)
    whole = content_of(checkpoint)
    before = {key: tensor.read() for key, tensor in checkpoint_tensors(checkpoint, verify(checkpoint)).items()}
    outcomes = {"tried": count, "refused": 0, "right": 0}
    for _ in range(count):
        content = copy.deepcopy(whole)
        mutate(content, draw)
        seal(checkpoint, content)
        try:
            manifest = verify(checkpoint)
        except DamagedError:
            outcomes["refused"] += 1
            continue
        outcomes["right"] += 1
        after = {key: tensor.read() for key, tensor in checkpoint_tensors(checkpoint, manifest).items()}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert Manifest.read(checkpoint).files == manifest.files
    print(outcomes)
    assert outcomes["refused"] > outcomes["right"]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return copies of all values that a checkpoint has, by key and box, but for random states."""
    chunks = trainer.checkpoints._chunks()
    return {f"{chunk.key} {chunk.box}": chunk.values.clone() for chunk in chunks if not chunk.key.startswith("rng/")}


def wreck(trainer: Trainer) -> None:
    """Set all weights and moments to zero."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
        for fragment in fragments(trainer.engine):
            fragment.master.zero_()
        for state in inner_optimizer(trainer.engine).state.values():
            for value in state.values():
                value.zero_()
        for buffer in trainer.model.buffers():
            buffer.zero_()


def load_mutated(config: Config, count: int) -> dict[str, int]:
    """Resume from a checkpoint, or take its weights, each time with a manifest that is wrong in another way.

    Returns:
        How many were tried, refused, and accepted with the state that was written.
    """
    trainer = make_trainer(config)
    take_steps(trainer, 2)
    trainer.step_index = 2
    checkpoint = trainer.save()
    trainer.checkpoints.flush()
    written, whole = state_of(trainer), content_of(checkpoint)
    wreck(trainer)
    before = state_of(trainer)
    assert all(not torch.equal(written[key], before[key]) for key in written if "weight" in key)
    draw = random.Random(22)
    outcomes = {"tried": count, "refused": 0, "right": 0}
    for number in range(count):
        content = copy.deepcopy(whole)
        mutate(content, draw)
        seal(checkpoint, content)
        begin = trainer.take_weights if number % 3 == 2 else trainer.resume
        message = ""
        try:
            begin(checkpoint)
        except UserError as error:
            message = str(error)
        outcomes["refused" if message else "right"] += 1
        assert not message or checkpoint.name in message, message
        now, expected = state_of(trainer), before if message else written
        if not message and number % 3 == 2:
            expected = {key: value for key, value in expected.items() if key.startswith("model/")}
        for key, value in expected.items():
            assert torch.equal(now[key], value), (number, key)
        wreck(trainer)
        before = state_of(trainer)
    seal(checkpoint, whole)
    trainer.resume(checkpoint)
    assert all(torch.equal(value, written[key]) for key, value in state_of(trainer).items())
    return outcomes


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.fuzz)])
@pytest.mark.timeout(3600)
def test_fuzz_manifests_through_a_resume(count: int, tmp_path: Path) -> None:
    """An engine refuses with one message and is what it was, or it has the state that was written; nothing else."""
    config = layout_config(tmp_path, zero=1)
    (outcomes,) = run_ranks(1, load_mutated, config, count, timeout=3000)
    print(outcomes)
    assert outcomes["refused"] + outcomes["right"] == count
    assert outcomes["refused"] > outcomes["right"]
