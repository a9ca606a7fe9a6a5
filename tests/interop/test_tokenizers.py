"""Exported tokenizers tokenize as training did, whatever rules the tokenizer's file has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe.config.errors import UserError
from dsmoe.data.tokenizer import load_tokenizer, tokenizer_digest
from dsmoe.interop.export_tokenizer import tokenizer_files
from tests.helpers.hugging_face_models import MIXTRAL, make_config

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
BEGIN, END = "<|begin|>", "<|stop|>"
TEXTS = [
    "the quick brown fox",
    "",
    END,
    f"{END} {BEGIN}",
    "  two  spaces\n",
    f"a{END}b {BEGIN} c",
    "Ünï 漢字 🦊",
    "x" * 500,
    "<extra> word",
]


def template(*around: str) -> dict[str, Any]:
    """Return a post-processor that puts BEGIN before a text, END behind it, or both."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if BEGIN in around:
        single.insert(0, {"SpecialToken": {"id": BEGIN, "type_id": 0}})
    if END in around:
        single.append({"SpecialToken": {"id": END, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in enumerate((BEGIN, END))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
RULES: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing": lambda content: None,
    "a token before each text": lambda content: content.update(post_processor=template(BEGIN)),
    "a token behind each text": lambda content: content.update(post_processor=template(END)),
    "both": lambda content: content.update(post_processor=template(BEGIN, END)),
    "several processors": lambda content: content.update(
        post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template(BEGIN)]}
    ),
    "offsets": lambda content: content.update(post_processor=BYTE_LEVEL),
    "BERT's": lambda content: content.update(
        post_processor={"type": "BertProcessing", "sep": [END, 1], "cls": [BEGIN, 0]}
    ),
    "RoBERTa's": lambda content: content.update(
        post_processor={
            "type": "RobertaProcessing",
            "sep": [END, 1],
            "cls": [BEGIN, 0],
            "trim_offsets": True,
            "add_prefix_space": True,
        }
    ),
    "cutting": lambda content: content.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding": lambda content: content.update(
        padding={
            "strategy": {"Fixed": 40},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": BEGIN,
        }
    ),
    "dropout": lambda content: content["model"].update(dropout=0.5),
    "lower case": lambda content: content.update(normalizer={"type": "Lowercase"}),
    "a token that is not special": lambda content: content["added_tokens"].append(
        {**content["added_tokens"][0], "id": len(content["model"]["vocab"]), "content": "<extra>", "special": False}
    ),
}


def look_up_pieces(content: dict[str, Any]) -> None:
    """As models do that make the token END of text which spells it."""
    content["model"].update(ignore_merges=True)


RULES["pieces that are looked up"] = look_up_pieces


def make_tokenizer(path: Path, rule: str) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BEGIN, END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    content = json.loads(tokenizer.to_str())
    RULES[rule](content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("rule", RULES)
def test_the_export_gives_the_tokens_that_training_saw(rule: str, tmp_path: Path) -> None:
    data = {"tokenizer": str(make_tokenizer(tmp_path / "tokenizer.json", rule)), "end_of_document": END}
    config = make_config(tmp_path, {**MIXTRAL, "model": {**MIXTRAL["model"], "vocab_size": 320}}, data=data)
    trained = load_tokenizer(config)
    expected = [tokens.tolist() for tokens in trained.encode_batch(TEXTS)]
    exported = tokenizer_files(config, None)
    assert exported.end == (END, trained.end_of_document)
    (tmp_path / "out").mkdir()
    for name, text in exported.files.items():
        (tmp_path / "out" / name).write_text(text, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [theirs(text)["input_ids"] for text in TEXTS] == expected
    assert (theirs.eos_token, theirs.eos_token_id) == (END, 1)
    assert theirs.bos_token is None
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    alone.encode_special_tokens = True  # which that library does not save
    assert [alone.encode(text).ids for text in TEXTS] == expected


def test_an_end_that_the_file_has_not_is_refused(tmp_path: Path) -> None:
    data = {"tokenizer": str(make_tokenizer(tmp_path / "tokenizer.json", "nothing")), "end_of_document": "<|other|>"}
    config = make_config(tmp_path, {**MIXTRAL, "model": {**MIXTRAL["model"], "vocab_size": 320}}, data=data)
    with pytest.raises(UserError, match=r"data.end_of_document \('<\|other\|>'\) is no token of the tokenizer"):
        tokenizer_files(config, None)


def test_another_file_at_the_tokenizers_path_is_not_exported(tmp_path: Path) -> None:
    """It makes other tokens of a text than those whose embeddings the model has."""
    path = make_tokenizer(tmp_path / "tokenizer.json", "nothing")
    data = {"tokenizer": str(path), "end_of_document": END}
    config = make_config(tmp_path, {**MIXTRAL, "model": {**MIXTRAL["model"], "vocab_size": 320}}, data=data)
    trained = tokenizer_digest(config)
    assert tokenizer_files(config, None, trained).is_trained
    assert tokenizer_files(config, None).is_trained  # of checkpoints that do not say
    make_tokenizer(path, "lower case")
    with pytest.raises(UserError, match=r"\(data.tokenizer\) is not the one that the model was trained with"):
        tokenizer_files(config, None, trained)
    assert not tokenizer_files(config, str(path), trained).is_trained  # whoever names it answers for it
    assert not tokenizer_files(config, "bytes", trained).is_trained
