"""What a resumed run reads and at which rate, where its config is not the one that was saved: said with numbers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsmoe.checkpoint.manifest import DamagedError, Facts
from dsmoe.config import UserError, dump_config
from dsmoe.config.schedules import learning_rate
from dsmoe.config.schema import Config
from dsmoe.data.sampling_order import Mixture
from dsmoe.plan.plan import Plan
from dsmoe.train.changed import Order, changed_held_out, changed_order, changed_rate, rate_when_longer
from dsmoe.train.summary import _next_steps
from tests.helpers.small_runs import small_config
from tests.train.test_run import pretrain

CHECKPOINT = Path("runs/small/checkpoints/step_00000050")
SAVED = Order(
    version=2,
    seed=0,
    shares={"web": 0.9, "books": 0.1},
    sequences={"web": 3000, "books": 200},
    texts={"web": "aa", "books": "bb"},
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """100 steps of 8 sequences."""
    return small_config(tmp_path, train={"steps": 100})


def facts(config: Config, order: Order | None, step: int = 50, schedule_step: int | None = None) -> Facts:
    corpora = {"web": [3000 * 32 + 1, 1], "books": [200 * 32 + 1, 1]}
    return Facts(
        step=step,
        tokens=step * 256,
        skipped_steps=0,
        schedule_step=step if schedule_step is None else schedule_step,
        validation_loss=None,
        optimizer="AdamW",
        config=config.model_dump(mode="json"),
        layout={},
        versions={},
        corpora=corpora,
        order=asdict(order) if order else {},
    )


def told(config: Config, here: Order, saved: Order | None = SAVED, step: int = 50) -> list[str]:
    """The lines of the refusal, which are those of the warning and one more."""
    with pytest.raises(UserError) as refused:
        changed_order(CHECKPOINT, facts(config, saved, step), Plan.from_config(config), here)
    accepting = config.model_copy(update={"data": config.data.model_copy(update={"changed_order": "accept"})})
    said = changed_order(CHECKPOINT, facts(config, saved, step), Plan.from_config(accepting), here)
    *lines, way = str(refused.value).splitlines()
    assert said is not None
    assert lines == said.splitlines()
    assert way.startswith("To go on so, set data.changed_order: accept.")
    return [" ".join(line.split()) for line in lines]


def test_another_tokenizer_is_never_accepted(config: Config) -> None:
    """Its numbers are other tokens, even where the text has the same: the model has learnt nothing of them."""
    first, second = (replace(SAVED, tokenizer=f"sha256:{digit * 64}") for digit in "12")
    accepting = config.model_copy(update={"data": config.data.model_copy(update={"changed_order": "accept"})})
    for each in (config, accepting):
        with pytest.raises(
            UserError, match=r"another tokenizer: data.tokenizer is bytes, .* sha256:2222.* sha256:1111"
        ):
            changed_order(CHECKPOINT, facts(config, first), Plan.from_config(each), second)
        assert changed_order(CHECKPOINT, facts(config, first), Plan.from_config(each), first) is None
        # SAVED is of before that was recorded.
        assert changed_order(CHECKPOINT, facts(config, SAVED), Plan.from_config(each), first) is None


def test_nothing_is_said_of_the_same_order(config: Config) -> None:
    same = [
        SAVED,
        replace(SAVED, shares={"books": 0.1, "web": 0.9}, sequences={"books": 200, "web": 3000}),
        replace(SAVED, shares={"web": 0.9 + 1e-16, "books": 0.1}),
    ]
    for here in same:
        assert changed_order(CHECKPOINT, facts(config, SAVED), Plan.from_config(config), here) is None


def test_changed_weights_say_what_is_read_twice_and_what_is_left_out(config: Config) -> None:
    """And so it is: what is counted here is what the two orders read."""
    here = replace(SAVED, shares={"web": 0.5, "books": 0.5})
    lines = told(config, here, step=30)
    lengths = list(SAVED.sequences.values())
    before = Mixture(lengths, [0.9, 0.1], 0, ["web", "books"]).locate(0, 240)
    after = Mixture(lengths, [0.5, 0.5], 0, ["web", "books"]).locate(240, 560)
    read = {name: before[1][before[0] == i].tolist() for i, name in enumerate(SAVED.shares)}
    comes = {name: after[1][after[0] == i].tolist() for i, name in enumerate(SAVED.shares)}
    again = len(set(read["web"]) & set(comes["web"]))
    first_epoch = Mixture([200], [1], 0, ["books"]).locate(0, 200)[1].tolist()
    left_out = first_epoch.index(comes["books"][0]) - len(read["books"])
    assert again > 90 < left_out
    assert lines[1:] == [
        "saved here",
        "data.sources[web].weight, of all 90.000000% 50.000000%",
        "data.sources[books].weight, of all 10.000000% 50.000000%",
        "After step 30, and in the 70 steps that are left:",
        f"web: {again} sequences are read a second time before new ones come",
        f"books: {left_out} sequences are left out",
    ]


def test_added_removed_and_renamed_sources_are_said(config: Config) -> None:
    here = replace(
        SAVED,
        shares={"web": 0.9, "novels": 0.1},
        sequences={"web": 3000, "novels": 200},
        texts={"web": "aa", "novels": "b"},
    )
    lines = told(config, here)
    assert "data.sources[books] 10.000000% absent" in lines
    assert "data.sources[novels] absent 10.000000%" in lines
    assert re.search(r"books: \d+ sequences have been read, and no more will be", "\n".join(lines))
    assert re.search(r"novels: new; of its 200 sequences, the order takes \d+ for read", "\n".join(lines))
    assert not any("eval/loss" in line or "has the text of" in line for line in lines)
    renamed = told(config, replace(here, texts={"web": "aa", "novels": "bb"}))
    assert "novels has the text of books: under that name it goes on as before" in renamed


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"seed": 1}, "data.seed 0 1"),
        ({"sequences": {"web": 3000, "books": 210}}, "data.sources[books], training sequences 200 210"),
        ({"texts": {"web": "aa", "books": "cc"}}, "data.sources[books], checksum of its text and split bb cc"),
        ({"version": 3}, "dsmoe's rules of the order version 2 version 3"),
    ],
)
def test_what_makes_another_order_is_said(change: dict, row: str, config: Config) -> None:
    lines = told(config, replace(SAVED, **change))
    assert row in lines
    assert any(re.match(r"books: the \d+ sequences that come are in another order: about [\d.]+% of", x) for x in lines)


def test_a_checkpoint_from_before_the_order_was_recorded(config: Config) -> None:
    lines = told(config, replace(SAVED, shares={"sums": 1.0}, sequences={"sums": 99}, texts={"sums": "x"}), None)
    assert "dsmoe's rules of the order version 1 version 2" in lines
    assert "data.sources[sums], training sequences unknown 99" in lines


def test_a_record_of_another_shape_is_damage(config: Config) -> None:
    saved = facts(config, SAVED)
    for wrong in ({"version": 2}, {**asdict(SAVED), "shares": [1]}, {**asdict(SAVED), "seed": None}):
        with pytest.raises(DamagedError, match=f"^{CHECKPOINT} is damaged: facts.order."):
            changed_order(CHECKPOINT, replace(saved, order=wrong), Plan.from_config(config), SAVED)


def _set(*path: str, to: object = None, missing: bool = False) -> Callable[[dict[str, Any]], object]:
    """Another value, or none, at a path of the facts."""

    def change(content: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            content = content[key]
        if missing:
            del content[last]
        else:
            content[last] = to

    return change


def _of_old(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    """Facts from before the order was recorded, changed."""

    def both(content: dict[str, Any]) -> None:
        content["order"] = {}
        change(content)

    return both


def _of_no_step(content: dict[str, Any]) -> None:
    content["config"]["train"].update(steps=None, tokens=5, batch_tokens=256)


WRONG = {
    "share 0": ("facts.order.shares.web", _set("order", "shares", "web", to=0.0)),
    "share of text": ("facts.order.shares.web", _set("order", "shares", "web", to="0.9")),
    "no shares": ("facts.order", _set("order", "shares", to={})),
    "share below 0": ("facts.order.shares.web", _set("order", "shares", "web", to=-1.0)),
    "share that is no number": ("facts.order.shares.web", _set("order", "shares", "web", to=math.nan)),
    "shares of more than all": ("facts.order", _set("order", "shares", "web", to=0.95)),
    "a further share": ("facts.order", _set("order", "shares", to={"web": 0.8, "books": 0.1, "new": 0.1})),
    "no sequences of one": ("facts.order", _set("order", "sequences", "web", missing=True)),
    "0 sequences": ("facts.order.sequences.web", _set("order", "sequences", "web", to=0)),
    "no texts": ("facts.order", _set("order", "texts", to={})),
    "texts of others": ("facts.order", _set("order", "texts", to={"web": "aa", "q": "bb"})),
    "a seed below 0": ("facts.order.seed", _set("order", "seed", to=-1)),
    "version 0": ("facts.order.version", _set("order", "version", to=0)),
    "no optimizer": ("facts.config.optimizer", _set("config", "optimizer", missing=True)),
    "an optimizer of text": ("facts.config.optimizer", _set("config", "optimizer", to="x")),
    "an lr of text": ("facts.config.optimizer.lr", _set("config", "optimizer", "lr", to="high")),
    "no lr": ("facts.config.optimizer.lr", _set("config", "optimizer", "lr", missing=True)),
    "lr without end": ("facts.config.optimizer.lr", _set("config", "optimizer", "lr", to=math.inf)),
    "a huge warm-up": ("facts.config.optimizer.warmup_steps", _set("config", "optimizer", "warmup_steps", to=10**400)),
    "no steps": ("facts.config.train", _set("config", "train", "steps", missing=True)),
    "steps of text": ("facts.config.train.steps", _set("config", "train", "steps", to="x")),
    "a batch of 0": ("facts.config.train.batch_tokens", _set("config", "train", "batch_tokens", to=0)),
    "no whole step": ("facts.config.train", _of_no_step),
    "a schedule ahead of the steps": ("facts.schedule_step", _set("schedule_step", to=10**18)),
    "old, no data": ("facts.config.data", _of_old(_set("config", "data", missing=True))),
    "old, no sources": ("facts.config.data.sources", _of_old(_set("config", "data", "sources", to=[]))),
    "old, a source of text": ("facts.config.data.sources.0", _of_old(_set("config", "data", "sources", to=["x"]))),
    "old, a seed of text": ("facts.config.data.seed", _of_old(_set("config", "data", "seed", to="x"))),
    "old, a length of 0": (
        "facts.config.train.sequence_length",
        _of_old(_set("config", "train", "sequence_length", to=0)),
    ),
    "old, empty corpora": ("facts.corpora.s.0", _of_old(_set("corpora", to={"s": []}))),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_manifest_records_wrongly_is_damage_that_names_the_field(name: str, config: Config) -> None:
    """Its checksum is right: somebody has written it so."""
    field, change = WRONG[name]
    content = copy.deepcopy(asdict(facts(config, SAVED)))
    changed_order(CHECKPOINT, Facts(**content), Plan.from_config(config), SAVED)
    changed_rate(CHECKPOINT, Facts(**content), Plan.from_config(config))
    change(content)
    with pytest.raises(DamagedError) as refused:  # noqa: PT012
        changed_rate(CHECKPOINT, Facts(**content), Plan.from_config(config))
        changed_order(CHECKPOINT, Facts(**content), Plan.from_config(config), SAVED)
    assert str(refused.value).startswith(f"{CHECKPOINT} is damaged: {field}: ")
    assert "\n" not in str(refused.value)


def with_schedule(config: Config, steps: int, **optimizer: object) -> Config:
    return Config.model_validate(
        {
            **config.model_dump(),
            "optimizer": {"lr": 1e-3, **optimizer},
            "train": {**config.train.model_dump(), "steps": steps},
        }
    )


SCHEDULES = {
    "constant": {"schedule": "constant"},
    "cosine": {"schedule": "cosine", "warmup_steps": 10, "min_lr": 1e-4},
    "linear": {"schedule": "linear"},
    "wsd": {"schedule": "wsd"},
    "wsd of 20": {"schedule": "wsd", "decay_steps": 20},
}


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "jump"),
    [
        ("constant", 100, 200, None),
        ("cosine", 5, 200, None),  # while it warms up
        ("cosine", 50, 100, None),
        ("cosine", 100, 200, ("0.0001", "0.0005797")),
        ("cosine", 50, 200, ("0.0006281", "0.0009005")),
        ("cosine", 50, 60, ("0.0006281", "0.0001701")),
        ("linear", 100, 200, ("0", "0.000495")),
        ("wsd", 70, 200, None),
        ("wsd", 90, 200, ("0.0005", "0.001")),
        ("wsd", 100, 200, ("0", "0.001")),
        ("wsd of 20", 70, 75, ("0.001", "0.0002")),
    ],
)
def test_a_jump_of_the_rate_is_said_with_numbers(
    schedule: str, step: int, steps: int, jump: tuple[str, str] | None, config: Config
) -> None:
    saved = with_schedule(config, 100, **SCHEDULES[schedule])
    here = with_schedule(config, steps, **SCHEDULES[schedule])
    said = changed_rate(CHECKPOINT, facts(saved, SAVED, step), Plan.from_config(here))
    if jump is None:
        assert said is None
        return
    assert said is not None
    found = re.match(
        rf"the learning rate jumps: step {step} of 100 \(\w+\) had (\S+), .+; step {step + 1} of {steps} \(\w+\) "
        rf"takes (\S+)\. Without a jump: leave the length at 100 steps; or ",
        said,
    )
    assert found, said
    assert found.groups() == jump


@pytest.mark.parametrize(
    ("schedule", "saved_steps", "step", "steps"),
    [
        ("cosine", 100, 100, 200),
        ("cosine", 20, 10, 40),  # in the middle, where the saved rate was to fall
        ("cosine", 20, 10, 15),
        ("cosine", 300, 97, 301 * 2),  # a rate of many digits
        ("linear", 20, 13, 40),
        ("wsd of 20", 100, 91, 200),
    ],
)
def test_what_is_to_be_written_instead_has_no_jump(
    schedule: str, saved_steps: int, step: int, steps: int, config: Config
) -> None:
    saved, longer = (with_schedule(config, number, **SCHEDULES[schedule]) for number in (saved_steps, steps))
    said = changed_rate(CHECKPOINT, facts(saved, SAVED, step), Plan.from_config(longer))
    assert said is not None
    assert f"leave the length at {saved_steps} steps; or " in said
    overrides = dict(item.split("=") for item in re.findall(r"optimizer\.\S+=[^\s;]+", said.partition("whose")[0]))
    changed = {key.removeprefix("optimizer."): yaml.safe_load(value) for key, value in overrides.items()}
    held = with_schedule(longer, steps, **{**longer.optimizer.model_dump(), **changed, "lr": float(changed["lr"])})
    assert held.optimizer.schedule == "constant"
    assert held.optimizer.decay_steps is None
    assert changed_rate(CHECKPOINT, facts(saved, SAVED, step), Plan.from_config(held)) is None


def test_a_rate_that_stays_is_no_jump(config: Config) -> None:
    saved = with_schedule(config, 20, **SCHEDULES["linear"])
    for rate in (learning_rate(saved.optimizer, 20, 9), learning_rate(saved.optimizer, 20, 10)):
        here = with_schedule(config, 40, schedule="constant", lr=rate)
        assert changed_rate(CHECKPOINT, facts(saved, SAVED, 10), Plan.from_config(here)) is None
        other = with_schedule(config, 40, schedule="constant", lr=1.01 * rate)
        assert changed_rate(CHECKPOINT, facts(saved, SAVED, 10), Plan.from_config(other)) is not None


def test_what_is_to_be_left_as_it_was_is_what_differs(config: Config) -> None:
    saved = with_schedule(config, 100, schedule="constant")
    lowered = with_schedule(config, 100, schedule="constant", lr=2e-4)
    said = changed_rate(CHECKPOINT, facts(saved, SAVED), Plan.from_config(lowered))
    assert said is not None
    assert "Without a jump: leave optimizer.lr at 0.001; or hold the rate: " in said
    assert "length" not in said
    longer = with_schedule(config, 200, schedule="constant", lr=2e-4)
    said = changed_rate(CHECKPOINT, facts(saved, SAVED), Plan.from_config(longer))
    assert said is not None
    assert "leave the length at 100 steps and optimizer.lr at 0.001; or " in said


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_summary_proposes_to_go_on_only_with_what_that_does(schedule: str, config: Config) -> None:
    run = with_schedule(config, 100, **SCHEDULES[schedule])
    (line,) = [line for line in _next_steps(Path("runs/small"), Plan.from_config(run)) if "train on from here" in line]
    assert ("the learning rate jumps from" in line) == (schedule != "constant")
    assert rate_when_longer(Plan.from_config(run), 100) is None


def test_a_command_with_other_weights_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run = small_config(tmp_path, train={"steps": 2}, checkpoint={"every": 1})
    (tmp_path / "config.yaml").write_text(dump_config(run), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert pretrain(tmp_path, *arguments).code == 0
    before = Path(run.runs_dir) / run.name / "checkpoints" / "step_00000002"
    other = ["name=other", f"checkpoint.resume={before}", "data.seed=7", "train.steps=3"]
    refused = pretrain(tmp_path, *arguments, *other)
    assert refused.code == 2
    assert "Traceback" not in refused.err
    assert f"{before} was made with another order of the training text:" in refused.err
    assert re.search(r"data\.seed +0 +7\n", refused.err)
    assert not (Path(run.runs_dir) / "other" / "config.yaml").exists()
    accepted = pretrain(tmp_path, *arguments, *other, "data.changed_order=accept")
    assert accepted.code == 0, accepted.err
    assert "another order of the training text" in accepted.out
    kept = (Path(run.runs_dir) / run.name / "config.yaml").read_text(encoding="utf-8")
    same_folder = pretrain(tmp_path, *arguments, "data.seed=7", "train.steps=3")
    assert same_folder.code == 2
    assert "set data.changed_order: accept" in same_folder.err
    assert (Path(run.runs_dir) / run.name / "config.yaml").read_text(encoding="utf-8") == kept
    again = pretrain(tmp_path, *arguments, "data.seed=7", "train.steps=3", "data.changed_order=accept")
    assert again.code == 0, again.err


EVALUATED: dict[str, tuple[dict, dict, str]] = {
    "fewer sequences": ({"train": {"eval_sequences": 4}}, {}, "train.eval_sequences, 16 -> 4"),
    "by the older name": (
        {"train": {"eval_sequences": None, "eval_batches": 3}},
        {},
        "train.eval_sequences, 16 -> null; train.eval_batches, null -> 3",
    ),
    "another share": ({"data": {"validation_fraction": 0.2}}, {}, "data.validation_fraction, 0.1 -> 0.2"),
    "another split": ({"data": {"seed": 3}}, {"seed": 3}, "data.seed, 0 -> 3"),
    "longer sequences": ({"train": {"sequence_length": 64}}, {}, "train.sequence_length, 32 -> 64"),
    "other text": ({}, {"texts": {"web": "aa", "books": "cc"}}, "the text of data.sources[books]"),
    "another source": ({}, {"texts": {"web": "aa"}}, "the text of data.sources[books]"),
}


@pytest.mark.parametrize("change", EVALUATED)
def test_a_run_that_evaluates_other_text_says_so_and_by_what(change: str, tmp_path: Path) -> None:
    options, order, why = EVALUATED[change]
    base = {"train": {"eval_sequences": 16}, "data": {"validation_fraction": 0.1}}
    saved = replace(facts(small_config(tmp_path, **base), SAVED), held_out="a")  # type: ignore[arg-type]
    config = small_config(tmp_path, **{key: {**base[key], **options.get(key, {})} for key in base})  # type: ignore[arg-type]
    said = changed_held_out(CHECKPOINT, saved, config, replace(SAVED, **order), "b")
    assert said is not None
    assert f"was made ({why}): held-out losses before and after do not compare" in said, said
    assert changed_held_out(CHECKPOINT, replace(saved, held_out=""), config, SAVED, "b") is None  # nobody knows
    same = changed_held_out(CHECKPOINT, saved, config, SAVED, "a")
    assert (same is None) is (change != "longer sequences")


def test_where_only_the_name_of_the_number_changes_nothing_is_said(tmp_path: Path) -> None:
    saved = replace(facts(small_config(tmp_path, train={"eval_sequences": 16}), SAVED), held_out="a")
    config = small_config(tmp_path, train={"eval_sequences": None, "eval_batches": 2})
    assert changed_held_out(CHECKPOINT, saved, config, SAVED, "a") is None
