"""`meta.json`: what a folder of the cache is, sealed, with the size and checksum of each of its files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe.config.sealed import is_sealed, sealed_json
from dsmoe.data.stored import DamagedCacheError, StoredFile
from dsmoe.durable import NotAFileError, check_regular, not_a_file

META = "meta.json"
FORMAT_VERSION = 2
"""1 had no checksums, and another split."""
PARTS = ("train", "validation")
_OF_FILES = ("num_files", "files")
"""Of a recipe's source, what says which files were at its path."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Strict):
    """Size and checksum of a file."""

    bytes: Count
    xxh128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

    @property
    def stored(self) -> StoredFile:
        """As `dsmoe.data.stored` wants it."""
        return StoredFile(self.bytes, self.xxh128)


class Part(_Strict):
    """`train` or `validation`."""

    tokens: Count
    bytes: Count
    """Of the text."""
    documents: Count
    token_file: File
    document_file: File


class Meta(_Strict):
    """The contents of a `meta.json`, but for its seal."""

    dtype: Literal["<u2", "<u4"]
    max_token: Count
    """No token of either part is larger."""
    is_cut: bool
    """The corpus is a single document, whose end is held out."""
    train: Part
    validation: Part
    recipe: dict[str, Any]
    """What decided all this."""

    def parts(self) -> dict[str, Part]:
        """Both, by name."""
        return {"train": self.train, "validation": self.validation}

    def files(self) -> dict[str, StoredFile]:
        """All files but this one, by name."""
        return {
            name: file.stored
            for part, found in self.parts().items()
            for name, file in ((token_file(part), found.token_file), (document_file(part), found.document_file))
        }


def token_file(part: str) -> str:
    """The name of the tokens of `train` or `validation`."""
    return f"{part}.bin"


def document_file(part: str) -> str:
    """The name of the list of their documents."""
    return f"{part}.documents"


def write_meta(folder: Path, meta: Meta) -> None:
    """Write it, sealed."""
    (folder / META).write_text(sealed_json(meta.model_dump()), encoding="utf-8")


def read_meta(folder: Path, recipe: Mapping[str, Any]) -> Meta:
    """Read that of a folder which is to have what `recipe` makes.

    Raises:
        DamagedCacheError: it is missing, not what was written, or of another recipe.
        OSError: it cannot be read.
    """
    try:
        check_regular(folder / META)
        text = (folder / META).read_text(encoding="utf-8")
        content = json.loads(text)
        if not is_sealed(text, content):
            raise DamagedCacheError(folder, f"{META} is not what was written")
        meta = Meta.model_validate({key: value for key, value in content.items() if key != "sha256"})
    except FileNotFoundError:
        raise DamagedCacheError(folder, f"{META} is missing") from None
    except (NotAFileError, IsADirectoryError) as error:
        raise DamagedCacheError(folder, f"{META} {not_a_file(error)}") from None
    except DamagedCacheError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCacheError(folder, f"{META}: {where}: {first['msg']}") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise DamagedCacheError(folder, f"{META} is not what was written") from None
    if json.dumps(meta.recipe, sort_keys=True) != json.dumps(recipe, sort_keys=True):
        raise DamagedCacheError(folder, f"{META} is that of another corpus, tokenizer or split")
    return meta


def made_of_lost_text(cache_dir: Path, name: str, recipe: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The folder that was made by `recipe` of text that is not there any more, with its own recipe.

    Args:
        cache_dir: where the folders are.
        name: the source's.
        recipe: what decides its contents, the path of the text as well, but for which files were there.

    Returns:
        None where there is none, or several of different texts.
    """
    found = []
    for folder in sorted(cache_dir.glob(f"{glob.escape(name)}-{16 * '[0-9a-f]'}")):
        try:
            content = json.loads((folder / META).read_bytes())
            own, parts = content["recipe"], json.dumps([content[part]["token_file"] for part in PARTS])
            source = {key: value for key, value in own["source"].items() if key not in _OF_FILES}
            same = json.dumps({**own, "source": source}, sort_keys=True) == json.dumps(recipe, sort_keys=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if same:
            found.append((folder, own, parts))
    if len({parts for _, _, parts in found}) != 1:
        return None
    return found[-1][:2]


def old_formats(cache_dir: Path, name: str) -> Iterator[tuple[Path, object]]:
    """The folders of source `name` that another version of dsmoe has made, and of which format each is."""
    for path in sorted(cache_dir.glob(f"{glob.escape(name)}-{16 * '[0-9a-f]'}")):
        try:
            version = json.loads((path / META).read_bytes())["recipe"]["format_version"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if version != FORMAT_VERSION:
            yield path, version
