"""A checkpoint that is damaged, foreign, or of another model is refused before anything is loaded, by name."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from dsmoe.checkpoint.compatibility import check_fits
from dsmoe.checkpoint.folder import candidates, verify
from dsmoe.checkpoint.manifest import DamagedError, _sealed
from dsmoe.checkpoint.safetensors import DTYPES, LazyTensor, write_tensors
from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.plan.plan import Plan
from dsmoe.runtime.spawn import run_ranks
from dsmoe.train.run_folder import check_run_folder
from tests.helpers.checkpoint_runs import MODEL, folder_of, layout_config, logged_from_now, save_between, tensors_of
from tests.helpers.small_runs import make_trainer

TWO = {"ranks": 2, "expert": 2, "zero": 1, "precision": "bf16"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of two ranks."""
    config = layout_config(tmp_path_factory.mktemp("saved"), **TWO)
    run_ranks(2, save_between, config, 2, 0)
    return folder_of(config) / "step_00000002"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be harmed."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_an_undamaged_one_is_whole_and_has_few_files(checkpoint: Path) -> None:
    names = [path.name for path in files_of(checkpoint)]
    assert names == ["manifest.json", "rank_00000_000.safetensors", "rank_00001_000.safetensors"]
    assert verify(checkpoint).facts.step == 2


def flip(content: bytes, place: float) -> bytes:
    at = min(int(place * len(content)), len(content) - 1)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("place", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found_in_every_file(checkpoint: Path, place: float) -> None:
    for path in files_of(checkpoint):
        content = path.read_bytes()
        path.write_bytes(flip(content, place))
        with pytest.raises(DamagedError, match=re.escape(str(path))):
            verify(checkpoint)
        path.write_bytes(content)
    verify(checkpoint)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_or_missing_file_is_found_without_reading_any(checkpoint: Path, kept: float) -> None:
    for path in files_of(checkpoint):
        content = path.read_bytes()
        for harm in (lambda p=path, c=content: p.write_bytes(c[: int(kept * len(c))]), path.unlink):
            harm()
            found, reasons = candidates(checkpoint.parent)
            assert found == []
            assert str(path) in reasons[0]
            path.write_bytes(content)
    assert candidates(checkpoint.parent) == ([checkpoint], [])


class Harmful:
    """An object whose unpickling runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_malicious_pickle_is_not_executed_wherever_it_is(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Harmful(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"
    mark.unlink()
    for name in ("rank_00002.pt", ".metadata", "model.pt"):
        (checkpoint / name).write_bytes(bomb)
    verify(checkpoint)
    assert run_ranks(1, refusal, layout_config(tmp_path), checkpoint) == ["resumed"], "what is not listed is not read"
    assert not mark.exists()
    for name in ("rank_00000_000.safetensors", "manifest.json"):
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(bomb)
        with pytest.raises(DamagedError, match=re.escape(str(path))):
            verify(checkpoint)
        (message,) = run_ranks(1, refusal, layout_config(tmp_path), checkpoint)
        assert str(path) in message
        assert not mark.exists()
        path.write_bytes(content)


def test_a_manifest_that_agrees_with_itself_is_still_checked(checkpoint: Path) -> None:
    """Somebody may have written one by hand, checksum and all."""
    path = checkpoint / "manifest.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    del whole["sha256"]

    def refused(change: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads(json.dumps(whole))
        change(content)
        path.write_text(_sealed(content), encoding="utf-8")
        with pytest.raises(DamagedError, match=re.escape(str(path))):
            verify(checkpoint)

    key = "model/norm.weight"

    def elsewhere(content: dict[str, Any]) -> None:
        content["files"]["../../secret"] = content["files"].pop("rank_00000_000.safetensors")

    refused(elsewhere)
    refused(lambda content: content["tensors"][key][2].pop())
    refused(lambda content: content["tensors"][key][2][0].__setitem__(3, 1 << 40))
    refused(lambda content: content["tensors"].update({key: ["pickle", [1], []]}))
    refused(lambda content: content.update(format="something else"))
    refused(lambda content: content["facts"].pop("step"))
    path.write_text(_sealed(whole), encoding="utf-8")
    verify(checkpoint)


def refusal(config: Config, checkpoint: Path) -> str:
    """The message; nothing may have been loaded."""
    trainer = make_trainer(config)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    try:
        trainer.resume(checkpoint)
    except UserError as error:
        after = trainer.model.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        return str(error)
    return "resumed"


def test_resuming_names_the_damaged_file_on_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "rank_00001_000.safetensors"
    path.write_bytes(flip(path.read_bytes(), 0.7))
    for message in run_ranks(2, refusal, layout_config(tmp_path, **TWO), checkpoint):
        assert message == f"{path} is damaged: it is not what was written"


OTHER = {
    "width": ({"model": {**MODEL["model"], "hidden_size": 40}}, "model.hidden_size"),
    "vocabulary": ({"model": {**MODEL["model"], "vocab_size": 272}}, "model.vocab_size"),
    "experts": ({"moe": {**MODEL["moe"], "num_experts": 8}}, "moe.num_experts"),
    "scale": ({"moe": {**MODEL["moe"], "router": {"score": "sigmoid", "scale": 2.5}}}, "moe.router.scale"),
    "bias": ({"moe": {**MODEL["moe"], "balance": {}}}, "moe.balance.bias_update_rate is above 0"),
    "dense": ({"moe": None, "model": {**MODEL["model"], "dense_layers": 0}}, "moe.num_experts"),
}


def test_what_null_stands_for_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    """`MODEL` has 4 heads of 8."""
    manifest = verify(saved)
    settings = layout_config(tmp_path, model={**MODEL["model"], "head_dim": 8, "num_kv_heads": 2}).model_dump(
        mode="json"
    )
    check_fits(saved, manifest, settings, None)
    settings["model"]["num_kv_heads"] = None
    with pytest.raises(UserError, match=r"model\.num_kv_heads +2 +4"):
        check_fits(saved, manifest, settings, None)
    facts = replace(manifest.facts, config=settings)
    settings = layout_config(tmp_path, model={**MODEL["model"], "num_kv_heads": 4}).model_dump(mode="json")
    check_fits(saved, replace(manifest, facts=facts), settings, None)


def refusals(configs: list[Config], checkpoint: Path) -> list[str]:
    return [refusal(config, checkpoint) for config in configs]


def test_another_model_is_refused_with_a_table(checkpoint: Path, tmp_path: Path) -> None:
    configs = [layout_config(tmp_path, **changed) for changed, _ in OTHER.values()]
    (messages,) = run_ranks(1, refusals, configs, checkpoint)
    for message, (_, key) in zip(messages, OTHER.values(), strict=True):
        head, columns, *rows = message.splitlines()
        assert head == f"{checkpoint} is of another model:"
        assert columns.split() == ["key", "saved", "here"]
        (row,) = (row for row in rows if row.startswith(f"  {key} "))
        assert row.index(row.split()[-1]) == columns.index("here"), "aligned"
    assert "vocab_size  264    272" in messages[1]


def test_a_tensor_too_many_or_too_few_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["sha256"]
    content["tensors"]["model/nobody.knows"] = content["tensors"].pop("model/norm.weight")
    path.write_text(_sealed(content), encoding="utf-8")
    (message,) = run_ranks(1, refusal, layout_config(tmp_path), checkpoint)
    assert re.search(r"model/nobody\.knows +\[32\] +absent", message)
    assert re.search(r"model/norm\.weight +absent +\[32\]", message)


@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_that_are_exchanged_in_the_manifest_are_not_loaded(rank: int, checkpoint: Path, tmp_path: Path) -> None:
    """Two of one size, in the files of either rank."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["sha256"]
    alike: dict[str, list[Any]] = {}
    for dtype, _, boxes in content["tensors"].values():
        for box in boxes:
            alike.setdefault(f"{box[2]} {dtype} {box[1]}", []).append(box)
    one, other, *_ = next(boxes for key, boxes in alike.items() if key.startswith(f"rank_{rank:05d}") and boxes[1:])
    one[2:], other[2:] = other[2:], one[2:]
    path.write_text(_sealed(content), encoding="utf-8")
    for message in run_ranks(2, refusal, layout_config(tmp_path, **TWO), checkpoint):
        assert message.startswith(f"{path} is damaged: ")
        assert "in the file's own header" in message


def rewrite(checkpoint: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Write other tensors, or None for none, in the same files: names, headers, checksums and seal agree."""
    content = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    del content["sha256"]
    whole = {key: change(key, tensor) for key, tensor in tensors_of(checkpoint).items()}
    boxes: dict[str, list[tuple[str, list[Any], torch.Tensor]]] = {name: [] for name in content["files"]}
    for key, entry in list(content["tensors"].items()):
        tensor = whole[key]
        if tensor is None:
            del content["tensors"][key]
            continue
        entry[0] = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
        for box in entry[2]:
            part = tensor[tuple(slice(start, start + size) for start, size in zip(box[0], box[1], strict=True))]
            boxes[box[2]].append((f"{key}[{','.join(map(str, box[0]))}]", box, part))
    for name, parts in boxes.items():
        parts.sort(key=lambda part: -part[2].dtype.itemsize)
        items = [LazyTensor(box_name, x.dtype, tuple(x.shape), lambda x=x: x) for box_name, _, x in parts]
        file, offsets = write_tensors(checkpoint / name, items)
        content["files"][name] = {"bytes": file.bytes, "xxh128": xxh3_128((checkpoint / name).read_bytes()).hexdigest()}
        for (_, box, _), offset in zip(parts, offsets, strict=True):
            box[3] = offset
    (checkpoint / "manifest.json").write_text(_sealed(content), encoding="utf-8")


TYPES = {
    "model": (torch.int32, torch.bool, torch.float16, torch.bfloat16, torch.float64),
    "exp_avg": (torch.int64, torch.bfloat16),
    "exp_avg_sq": (torch.bool, torch.float64),
    "step": (torch.int32,),
    "rng": (torch.int8,),
}


def test_tensors_of_other_types_are_not_converted_but_refused(saved: Path, tmp_path: Path) -> None:
    for kind, types in TYPES.items():
        for dtype in types:
            checkpoint = Path(shutil.copytree(saved, tmp_path / f"{kind}_{dtype}" / saved.name))
            rewrite(checkpoint, lambda key, x, k=kind, t=dtype: x.to(t) if key.startswith(f"{k}/") else x)
            with pytest.raises(DamagedError, match=rf"manifest\.json is damaged: {kind}/\S+ is [A-Z0-9]+, and "):
                verify(checkpoint)


def refusals_of(config: Config, checkpoints: list[Path]) -> list[list[str]]:
    """Return for each checkpoint the messages of resuming it and of taking its weights."""
    trainer = make_trainer(config)
    said = []
    for checkpoint in checkpoints:
        messages = []
        for begin in (trainer.resume, trainer.take_weights):
            try:
                begin(checkpoint)
                messages.append("taken")
            except UserError as error:
                messages.append(str(error))
        said.append(messages)
    return said


def test_what_only_the_engine_can_see_is_refused_there(saved: Path, tmp_path: Path) -> None:
    """Buffers of another type or shape, no moments after two steps, moments that no gradient makes."""
    changes: dict[str, Callable[[str, torch.Tensor], torch.Tensor | None]] = {
        "rewritten": lambda _, x: x,
        "bias": lambda key, x: x.to(torch.bool) if key.endswith("balance.bias") else x,
        "half": lambda key, x: x.to(torch.float16) if key.startswith("buffer/") else x,
        "moments": lambda key, x: None if key.startswith(("exp_avg", "step/")) else x,
        "squares": lambda key, x: -x if key.startswith("exp_avg_sq/") else x,
        "steps": lambda key, x: -x if key.startswith("step/") else x,
        "random": lambda key, x: None if key.startswith("rng/") else x,
    }
    checkpoints = []
    for name, change in changes.items():
        checkpoints.append(Path(shutil.copytree(saved, tmp_path / name / saved.name)))
        rewrite(checkpoints[-1], change)
        verify(checkpoints[-1])
    for said in run_ranks(2, refusals_of, layout_config(tmp_path, **TWO), checkpoints):
        messages = dict(zip(changes, said, strict=True))
        assert messages["rewritten"] == ["taken", "taken"]
        assert all("balance.bias is BOOL, and is saved as F32" in message for message in messages["bias"])
        assert all("is F16, and is saved as F32" in message for message in messages["half"])
        assert "2 steps were taken, and there is no state of the optimizer" in messages["moments"][0]
        assert re.search(r"a state that cannot be \(exp_avg_sq/\S+ has negative elements\)", messages["squares"][0])
        assert re.search(r"a state that cannot be \(step/\S+ has negative elements\)", messages["steps"][0])
        assert re.search(r"rng/cpu +absent +\[2, \d+\]", messages["random"][0])
        assert [messages[name][1] for name in ("moments", "squares", "steps", "random")] == ["taken"] * 4


def test_another_optimizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["sha256"]
    content["facts"]["optimizer"] = "Muon"
    path.write_text(_sealed(content), encoding="utf-8")
    (message,) = run_ranks(1, refusal, layout_config(tmp_path), checkpoint)
    assert message.splitlines()[0] == f"{checkpoint} is of another optimizer:"
    assert message.splitlines()[-1].split() == ["optimizer", "Muon", "AdamW"]


def test_other_steps_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (message,) = run_ranks(1, refusal, layout_config(tmp_path, train={"batch_tokens": 512}), checkpoint)
    head, _, row = message.splitlines()
    assert head == f"{checkpoint} is of a run with other steps (for its weights alone: checkpoint.weights_from):"
    assert row.split() == ["train.batch_tokens", "256", "512"]


def go_on_with_another_text(config: Config, checkpoint: Path) -> list[str]:
    logged = logged_from_now()
    trainer = make_trainer(config)
    trainer.resume(checkpoint)
    assert logged == []
    order = trainer.data.order
    ((name, length),) = order.sequences.items()
    trainer.data = replace(trainer.data, order=replace(order, sequences={name: length + 1000}))
    with pytest.raises(UserError) as refused:
        trainer.resume(checkpoint)
    assert trainer.step_index == 2
    accepting = config.model_copy(update={"data": config.data.model_copy(update={"changed_order": "accept"})})
    trainer.plan = Plan.from_config(accepting)
    trainer.resume(checkpoint)
    return [str(refused.value), *logged]


def test_another_text_is_refused_or_said(checkpoint: Path, tmp_path: Path) -> None:
    ((refused, said),) = run_ranks(1, go_on_with_another_text, layout_config(tmp_path), checkpoint)
    row = r"data\.sources\[sums\], training sequences +[\d,]+ +[\d,]+\n"
    assert re.search(rf"was made with another order of the training text:\n +saved +here\n +{row}", said)
    assert refused.startswith(said)
    assert "To go on so, set data.changed_order: accept." in refused


def fine_tune(config: Config, checkpoint: Path) -> dict[str, Any]:
    trainer = make_trainer(config)
    trainer.take_weights(checkpoint)
    step, had_moments = trainer.step_index, bool(trainer.engine.optimizer.optimizer.state)
    trainer.save()
    trainer.step()
    trainer.checkpoints.flush()
    return {"step": step, "had_moments": had_moments}


def test_weights_alone_are_taken_where_that_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    model = {**MODEL["model"], "max_sequence_length": 64}
    config = layout_config(
        tmp_path, 2, tensor=2, zero=2, model=model, moe={**MODEL["moe"], "balance": {"bias_update_rate": 0.1}}
    )
    for result in run_ranks(2, fine_tune, config, checkpoint):
        assert result == {"step": 0, "had_moments": False}
    source, begun = tensors_of(checkpoint), tensors_of(folder_of(config) / "step_00000000")
    for key, value in source.items():
        if key.startswith("model/") or key.endswith("balance.bias"):
            assert torch.equal(begun[key], value), key
    assert not any(key.startswith(("step/", "exp_avg")) for key in begun), "the optimizer begins anew"


@pytest.mark.parametrize("key", ["resume", "weights_from"])
def test_a_checkpoint_that_the_config_names_and_that_is_not_there_is_named_with_its_key(
    key: str, tmp_path: Path
) -> None:
    config = layout_config(tmp_path, checkpoint={key: str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=f"^checkpoint.{key}: {tmp_path}/nothing is not a whole checkpoint"):
        check_run_folder(Plan.from_config(config))
