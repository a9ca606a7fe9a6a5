"""Text that spells a special token stays text, whatever the tokenizer's model makes of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dsmoe.config.errors import UserError
from dsmoe.data import load_tokenizer, prepare
from dsmoe.data.special_tokens import literals_as_text
from dsmoe.data.tokenizer import FileTokenizer
from tests.data.conftest import MakeConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<<"]
LETTERS = "▁<>/abcdsunkx0AE"
END = "</s>"


def numbered(*extra: str, prefix: str = "") -> dict[str, int]:
    pieces = [*SPECIAL, *LETTERS, *(prefix + letter for letter in LETTERS if prefix), *extra]
    return {piece: number for number, piece in enumerate(pieces)}


def unigram() -> Tokenizer:
    scores = [0.0 if len(piece) > 1 else -5.0 for piece in numbered("ab")]
    return Tokenizer(models.Unigram(list(zip(numbered("ab"), scores, strict=True)), 0, False))


def unigram_of_bytes() -> Tokenizer:
    vocabulary = [(f"<0x{byte:02X}>", -1.0) for byte in range(256)]
    return Tokenizer(models.Unigram([(piece, -5.0) for piece in numbered()] + vocabulary, 0, True))


def bpe_with_merges() -> Tokenizer:
    return Tokenizer(
        models.BPE(numbered("/s", "s>", "ab", "/s>"), [("/", "s"), ("/s", ">"), ("<", "/s>"), ("a", "b"), ("<", "<")])
    )


MODELS: dict[str, Callable[[], Tokenizer]] = {
    "Unigram": unigram,
    "Unigram of bytes": unigram_of_bytes,
    "BPE that ignores merges": lambda: Tokenizer(models.BPE(numbered("ab"), [("a", "b")], ignore_merges=True)),
    "BPE with merges": bpe_with_merges,
    "WordPiece": lambda: Tokenizer(models.WordPiece(numbered(prefix="##"), unk_token="<unk>")),
}


def saved(make: Callable[[], Tokenizer], path: Path, special: list[str] | None = None) -> Path:
    tokenizer = make()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(SPECIAL if special is None else special)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("model", MODELS)
def test_no_text_gives_a_special_token_and_nothing_of_it_is_lost(model: str, tmp_path: Path) -> None:
    path = saved(MODELS[model], tmp_path / "t.json")
    content = path.read_bytes()
    tokenizer, plain = FileTokenizer(path, content), Tokenizer.from_buffer(content)
    plain.encode_special_tokens = True
    names = {number: piece for piece, number in plain.get_vocab().items()}
    forbidden = {plain.token_to_id(piece) for piece in SPECIAL}
    choose = random.Random(model)
    pieces = [*SPECIAL, *"ab<>/s ", "ab", "<<<", "</s", "</s></s>", "<0x0A>"]
    assert tokenizer.end_of_document in plain.encode(END).ids
    for _ in range(300):
        text = "".join(choose.choices(pieces, k=choose.randrange(1, 9)))
        tokens = tokenizer.encode(text).tolist()
        assert not forbidden & set(tokens), text
        spelled = "".join(names[token].removeprefix("##") for token in tokens)
        assert spelled == text.replace(" ", "▁"), text
        if not any(literal in text for literal in [*SPECIAL, "<0x0A>"]):
            assert tokens == plain.encode(text, add_special_tokens=False).ids, text


def test_words_that_are_looked_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "x": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = FileTokenizer(tmp_path / "t.json", (tmp_path / "t.json").read_bytes())
    assert loaded.encode(f"x {END} x").tolist() == [2, 0, 0, 2]


def test_an_end_that_is_an_added_token_but_not_special(tmp_path: Path) -> None:
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_tokens([AddedToken("<<end>>", special=False)])
    tokenizer.save(str(tmp_path / "t.json"))
    loaded = FileTokenizer(tmp_path / "t.json", (tmp_path / "t.json").read_bytes(), "<<end>>")
    assert loaded.end_of_document not in loaded.encode("a<<end>>b").tolist()


def test_a_file_whose_model_makes_no_special_token_is_as_it_was() -> None:
    tokenizer = Tokenizer(models.BPE(numbered("ab"), [("a", "b")]))
    tokenizer.add_special_tokens(SPECIAL)
    content = json.loads(tokenizer.to_str())
    assert literals_as_text(content, END) == content


def test_documents_stay_whole(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"ab a{number} b <s>ab</s> a </s>" for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "format": "jsonl"}
    data = {"tokenizer": str(saved(unigram, tmp_path / "t.json")), "validation_fraction": 0.3}
    config = make_config(source, data=data)
    end = load_tokenizer(config).end_of_document
    (prepared,) = prepare(config)
    assert sum(int((part == end).sum()) for part in (prepared.train, prepared.validation)) == 30


def test_an_end_within_a_document_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    """A literal that cannot be cut: a token with a prefix for the middle of words, which no text spells."""
    texts = ["ab " * 9, "ab " * 9 + "ax"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = {"name": "a", "path": str(tmp_path / "a.jsonl"), "format": "jsonl"}
    vocabulary = {"<unk>": 0, "a": 1, "##b": 2, "##x": 3}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.normalizer = normalizers.Replace("#", "")
    tokenizer.save(str(tmp_path / "t.json"))
    data = {"tokenizer": str(tmp_path / "t.json"), "end_of_document": "##x"}
    with pytest.raises(UserError, match=r"makes '##x'.* in document 2 of data.sources\[a\], which begins 'ab ab"):
        prepare(make_config(source, data=data))
    assert not any(path.name.startswith("a-") for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("end", ["ab", "a", "▁", "<"])
@pytest.mark.parametrize("special", [[], ["<s>", "a"]])
def test_an_ordinary_word_ends_no_document(end: str, special: list[str], tmp_path: Path) -> None:
    path = saved(unigram, tmp_path / "t.json", special)
    more = ", for example of its special tokens: <s>, a" if special else ""
    with pytest.raises(UserError) as refused:
        FileTokenizer(path, path.read_bytes(), end)
    assert str(refused.value) == (
        f"data.end_of_document ({end!r}) is an ordinary token of data.tokenizer {path}, which makes it of text, so "
        f"that documents would end within; set it to a special token{more}"
    )


def test_an_ordinary_word_in_the_alphabet_of_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"Ġ": 0, "t": 1, "h": 2, "th": 3, "Ġth": 4, END: 5}, [("t", "h"), ("Ġ", "th")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "t.json"))
    content = (tmp_path / "t.json").read_bytes()
    for end in ("Ġth", "th", "t"):
        with pytest.raises(UserError, match="is an ordinary token"):
            FileTokenizer(tmp_path / "t.json", content, end)
    assert FileTokenizer(tmp_path / "t.json", content, END).end_of_document == 5  # a token that no merge makes
