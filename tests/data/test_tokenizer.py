import json
from pathlib import Path

import numpy as np
import pytest

from dsmoe.config.errors import UserError
from dsmoe.data import load_tokenizer
from dsmoe.data.tokenizer import token_dtype
from tests.data.conftest import MakeConfig

TEXT = "The quick brown fox jumps over the lazy dog. Ünïcode too: 漢字 and 🦊.\n" * 4


def train_bpe(path: Path, end_of_document: str | None = "<|endoftext|>", vocab_size: int = 300) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document] if end_of_document else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.enable_truncation(5)  # as models save them; a corpus must not be cut
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return path


def source() -> dict:
    return {"name": "a", "path": "unused.txt"}


def test_bytes(make_config: MakeConfig) -> None:
    tokenizer = load_tokenizer(make_config(source()))
    assert tokenizer.encode("aß").tolist() == [97, 195, 159]
    assert tokenizer.encode("").tolist() == []
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.identity) == (257, 256, "bytes")
    assert tokenizer.encode("a").dtype == np.uint16


def test_bpe_file_encodes_everything_and_decodes_back(tmp_path: Path, make_config: MakeConfig) -> None:
    from tokenizers import Tokenizer

    path = train_bpe(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=300))
    tokens = tokenizer.encode(TEXT)
    assert 5 < len(tokens) < len(TEXT.encode())
    assert tokens.dtype == np.uint16
    assert Tokenizer.from_file(str(path)).decode(tokens.tolist()) == TEXT
    assert tokenizer.end_of_document == 0
    assert [part.tolist() for part in tokenizer.encode_batch([TEXT, "", "fox"])] == [
        tokens.tolist(),
        [],
        tokenizer.encode("fox").tolist(),
    ]


def test_text_cannot_spell_the_end_of_document(tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=300))
    assert tokenizer.end_of_document not in tokenizer.encode("fox<|endoftext|>dog").tolist()


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<eos>"])
def test_other_names_of_the_end_of_document(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json", name)
    assert load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=300)).end_of_document == 0


def test_the_end_of_document_that_the_config_names(tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json", "<|im_end|>")
    data = {"tokenizer": str(path), "end_of_document": "<|im_end|>"}
    named = load_tokenizer(make_config(source(), data=data, vocab_size=300))
    assert named.end_of_document == 0
    usual = train_bpe(tmp_path / "usual.json")
    data = {"tokenizer": str(usual), "end_of_document": "<|endoftext|>"}
    other = load_tokenizer(make_config(source(), data=data, vocab_size=300))
    assert (
        other.identity != load_tokenizer(make_config(source(), data={"tokenizer": str(usual)}, vocab_size=300)).identity
    )
    data["tokenizer"] = str(path)
    with pytest.raises(
        UserError, match=r"data.end_of_document \('<end>'\) is no token of .*special tokens: <|im_end|>"
    ):
        load_tokenizer(make_config(source(), data={**data, "end_of_document": "<end>"}, vocab_size=300))


def test_dropout_of_merges_is_not_for_a_corpus(tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json")
    config = make_config(source(), data={"tokenizer": str(path)}, vocab_size=300)
    whole = load_tokenizer(config).encode(TEXT).tolist()
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.9
    path.write_text(json.dumps(content), encoding="utf-8")
    assert [load_tokenizer(config).encode(TEXT).tolist() for _ in range(3)] == [whole] * 3


def test_no_end_of_document(tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json", None)
    assert load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=300)).end_of_document is None


def test_a_file_is_parsed_once_and_again_when_it_changes(tmp_path: Path, make_config: MakeConfig) -> None:
    path = train_bpe(tmp_path / "tokenizer.json")
    config = make_config(source(), data={"tokenizer": str(path)}, vocab_size=300)
    first = load_tokenizer(config)
    assert load_tokenizer(config) is first
    train_bpe(path, vocab_size=290)
    assert load_tokenizer(config).vocab_size == 290


def test_identity_is_the_content(tmp_path: Path, make_config: MakeConfig) -> None:
    first = train_bpe(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(first.read_bytes())
    third = train_bpe(tmp_path / "c.json", vocab_size=290)
    a, b, c = (
        load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=300)).identity
        for path in (first, tmp_path / "b.json", third)
    )
    assert a == b != c


def test_too_large_for_the_model(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"model.vocab_size \(256\).*bytes \(257\); set model.vocab_size to 257"):
        load_tokenizer(make_config(source(), vocab_size=256))
    path = train_bpe(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"\(299\).*\(300\); set model.vocab_size to 300"):
        load_tokenizer(make_config(source(), data={"tokenizer": str(path)}, vocab_size=299))


def test_missing_file(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"no file .*nope.json; give `bytes` or"):
        load_tokenizer(make_config(source(), data={"tokenizer": str(tmp_path / "nope.json")}))
    train_bpe(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"did you mean .*tokenizer.json\?"):
        load_tokenizer(make_config(source(), data={"tokenizer": str(tmp_path)}))


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\x00"])
def test_not_a_tokenizer(content: bytes, tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad.json is not a JSON file of the `tokenizers` library"):
        load_tokenizer(make_config(source(), data={"tokenizer": str(path)}))


def test_token_dtype() -> None:
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")
