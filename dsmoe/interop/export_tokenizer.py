"""A run's tokenizer as the files that `transformers.AutoTokenizer` reads."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe.config.errors import UserError
from dsmoe.config.schema import Config
from dsmoe.data.special_tokens import END_OF_DOCUMENT_NAMES, end_token, literals_as_text
from dsmoe.data.tokenizer import ByteTokenizer, content_digest


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of a tokenizer."""

    files: dict[str, str]
    """Contents by name."""
    end: tuple[str, int] | None
    """The end-of-document token as text and number, where there is one."""
    is_trained: bool = True
    """True if the contents are those that the model was trained with, as far as that was recorded."""


def tokenizer_files(config: Config, given: str | None, trained: str = "") -> TokenizerFiles:
    """Return the files of `data.tokenizer`, or of the file `given` in its place; none for `none`.

    Args:
        config: of the run.
        given: the user's choice in place of `data.tokenizer`; may differ from the tokenizer of the training.
        trained: `tokenizer_digest` of the tokenizer of the training; empty where it was not recorded.

    Raises:
        UserError: there is no such file, or it is not a tokenizer, or not the one of the training.
    """
    if given == "none":
        return TokenizerFiles({}, None)
    name = given or config.data.tokenizer
    if name == "bytes":
        text, digest = byte_tokenizer_json(), name
    else:
        path = Path(name)
        if not os.path.isfile(path):
            raise UserError(
                f"the tokenizer {path.absolute()} (data.tokenizer) is not there; say where it is with --tokenizer "
                f"FILE, or export without one with --tokenizer none"
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"the tokenizer {path.absolute()} cannot be read ({error.strerror})") from error
        text, digest = content.decode("utf-8", errors="replace"), content_digest(content)  # not text, so not JSON
    if trained and digest != trained and given is None:
        raise UserError(
            f"the tokenizer {name} (data.tokenizer) is not the one that the model was trained with, whose contents had "
            f"{trained[:19]}, and not {digest[:19]}; give that with --tokenizer FILE, or export without one with "
            f"--tokenizer none"
        )
    vocabulary = _vocabulary(name, text)
    highest = max(vocabulary.values(), default=-1)
    if highest >= config.model.vocab_size:
        raise UserError(
            f"the tokenizer {name} has token {highest}, and model.vocab_size is {config.model.vocab_size}: it is not "
            f"the one that the model was trained with; give that with --tokenizer FILE"
        )
    end = end_token(vocabulary, None if name == "bytes" else config.data.end_of_document, f"the tokenizer {name}")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        # As in training: the name of a special token within a text is text.
        "split_special_tokens": True,
    }
    if end is not None:
        settings |= {"eos_token": end[0], "pad_token": end[0]}
    return TokenizerFiles(
        {
            "tokenizer.json": _as_trained(text, None if end is None else end[0]),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        },
        end,
        not trained or digest == trained,
    )


def _as_trained(text: str, end: str | None) -> str:
    """Return a tokenizer.json that tokenizes as training does.

    Without what training leaves out: special tokens around a text, truncation, padding, dropout. A model trained
    without a token before each document has never seen one: its embedding is random numbers. With what training adds:
    text that spells a special token, or `end`, stays text.
    """
    content: dict[str, Any] = json.loads(text)
    changed = {**literals_as_text(content, end), "truncation": None, "padding": None, "post_processor": None}
    processors = content.get("post_processor") or {}
    offsets = [one for one in (processors.get("processors") or [processors]) if one.get("type") == "ByteLevel"]
    if offsets:  # says where in the text a token is, and adds none
        changed["post_processor"] = offsets[0]
    if changed["model"].get("dropout"):
        changed["model"] = {**changed["model"], "dropout": None}
    return text if changed == content else json.dumps(changed, ensure_ascii=False)


def byte_tokenizer_json() -> str:
    """Return the `bytes` tokenizer as one of the `tokenizers` library: a BPE without merges, with the same numbers.

    That library writes a byte as a printable character (GPT-2's table): a byte that is one stands for itself, and the
    other bytes, in order, are characters 256, 257 and so on.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = AddedToken(END_OF_DOCUMENT_NAMES[0], special=True, normalized=False)
    tokenizer.add_special_tokens([end])
    assert tokenizer.token_to_id(end.content) == ByteTokenizer.end_of_document
    return tokenizer.to_str()


def _vocabulary(name: str, text: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(f"{name} is not a JSON file of the `tokenizers` library ({error})") from None
