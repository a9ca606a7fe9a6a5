"""A tokenizer without tokens for much of the text is refused; for a little of it, a warning is logged."""

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dsmoe.config.errors import UserError
from dsmoe.data import load_tokenizer, prepare
from dsmoe.data.tokenizer import FileTokenizer
from dsmoe.data.tokenizer_coverage import Coverage
from tests.data.conftest import MakeConfig

LETTERS = "abcdefghijklm"
END = "</s>"


def bpe(alphabet: Iterable[str] = LETTERS, **keys: object) -> Tokenizer:
    names = ["<unk>", END, *alphabet, *("ab" for _ in range("a" in alphabet and "b" in alphabet))]
    merges = [("a", "b")] if "ab" in names else []
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges, **keys))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_level(text: str, *prefix: str) -> Tokenizer:
    """Make a tokenizer with tokens for the bytes of this text only."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text + " ")
    tokenizer = bpe("".join(sorted({character for piece, _ in pieces for character in piece})))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = bpe(LETTERS + "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def without_space() -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def wide() -> Tokenizer:
    tokenizer = byte_level(LETTERS)
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocabulary = {name: number for number, name in enumerate([END, *LETTERS, *(f"<0x{b:02X}>" for b in range(256))])}
    return Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))


def unigram() -> Tokenizer:
    return Tokenizer(
        models.Unigram([("<unk>", 0.0), (END, 0.0), *((c, -2.0) for c in LETTERS), ("xy", -2.0)], 0, False)
    )


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, END: 1, "abc": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_pieces() -> Tokenizer:
    names = ["<unk>", END, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "lost"),
    [
        (bpe, "abc xa yb\n", "xy"),
        (lambda: bpe(unk_token="<unk>"), "abc xa yb", "xy"),
        (lambda: bpe(unk_token="<unk>", fuse_unk=True), "xxa", "xx"),
        (lambda: bpe([*"abcx", "a</w>", "b</w>", "c</w>"], end_of_word_suffix="</w>"), "ax aax abc", "xx"),
        (without_space, "abc xa yb", "xy"),
        (metaspace, "abc xa yb", "xy"),
        (lambda: byte_level("abcé"), "abc é è", "è"),  # whose first byte é has too
        (lambda: byte_level("abcé", "a space before"), "abcé漢", "漢"),
        (wide, "\uff41\uff42\uff43 \uff58", "\uff58"),
        (byte_fallback, "abc x é 漢", ""),
        (unigram, "abcxyz", "z"),
        (words, "abc abcd abc", "abcd"),
        (word_pieces, "abc abx cab", "abx"),
    ],
)
def test_the_characters_that_are_lost(make: Callable[[], Tokenizer], text: str, lost: str, tmp_path: Path) -> None:
    make().save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(tmp_path / "t.json", (tmp_path / "t.json").read_bytes())
    assert tokenizer.lost_characters([text, "abc", ""]) == [lost, "", ""]


def corpus(tmp_path: Path, *texts: str) -> dict[str, str]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"name": "a", "path": str(tmp_path / "a.jsonl"), "format": "jsonl"}


@pytest.mark.parametrize("make", [bpe, words])
def test_much_is_refused(make: Callable[[], Tokenizer], tmp_path: Path, make_config: MakeConfig) -> None:
    make().save(str(tmp_path / "t.json"))
    texts = [f"document number {number} of these " + "abc " * 10 for number in range(40)]
    config = make_config(corpus(tmp_path, *texts), data={"tokenizer": str(tmp_path / "t.json")})
    with pytest.raises(
        UserError, match=r"^data.tokenizer: no token stands for \d\d.\d\d% of the .* of data.sources\[a\]"
    ):
        prepare(config)
    assert not any(path.name.startswith("a-") for path in (tmp_path / "cache").iterdir())


def test_a_small_loss_gives_a_warning_and_no_loss_none(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    bpe().save(str(tmp_path / "t.json"))
    for texts, is_warned in ((["abc " * 20 + "x"] * 20, True), (["abc " * 20] * 20, False)):
        unlike = [
            f"{'abcd'[number % 4]}{'efgh'[number // 4 % 4]}{'ijkl'[number // 16]} {text}"
            for number, text in enumerate(texts)
        ]
        config = make_config(corpus(tmp_path, *unlike), data={"tokenizer": str(tmp_path / "t.json")})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(config)
        assert (
            "no token stands for 1.56% of the characters of data.sources[a], counted in" in caplog.text
        ) is is_warned
        assert ("('x' most often)" in caplog.text) is is_warned


@pytest.mark.parametrize(("unknown", "is_refused"), [(5, True), (1, False)])
def test_a_large_source_gives_an_early_warning_and_is_judged_at_the_end(
    unknown: int, is_refused: bool, tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A source may begin with a language that is rare in it, so an early warning is no refusal."""
    words().save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(make_config(corpus(tmp_path, "a"), data={"tokenizer": str(tmp_path / "t.json")}))
    coverage = Coverage("a", tokenizer)
    told_after = []
    with caplog.at_level(logging.WARNING):
        for batch in range(10):
            coverage.count([f"{'xyz' if batch < unknown else 'abc'} " * 500] * 20, range(20))
            told_after.append(caplog.text.count("so far, data.tokenizer: no token stands for 100.00%"))
        with pytest.raises(UserError, match=r"for 50\.00%") if is_refused else nullcontext():
            coverage.finish()
    assert told_after == [1] * 10
    assert ("no token stands for 10.00%" in caplog.text) is not is_refused
