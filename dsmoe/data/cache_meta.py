"""`meta.json`: what a folder of the cache is, sealed, with the size and checksum of each of its files."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe.data.checksummed_files import DamagedCacheError, StoredFile
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file
from dsmoe.runtime.checksummed_json import is_sealed, sealed_json

META = "meta.json"
FORMAT_VERSION = 2
"""1 had no checksums, and another split."""
PARTS = ("train", "validation")
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Strict):
    """Size and checksum of a file."""

    bytes: Count
    xxh128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

    @property
    def stored(self) -> StoredFile:
        """As `dsmoe.data.checksummed_files` wants it."""
        return StoredFile(self.bytes, self.xxh128)


class Part(_Strict):
    """`train` or `validation`."""

    tokens: Count
    bytes: Count
    """Of the text."""
    documents: Count
    token_file: File
    document_file: File


class Origin(_Strict):
    """The text of a user's files, of which tokens were made."""

    path: str
    """Where it was, absolute."""
    from_cache: str
    """The same, from the folder of the cache."""
    files: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of its files (`names_and_sizes`)."""
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Of all documents, exact and in order (`TextDigest`)."""


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
    origin: Origin | None = None
    """None for text that is no user's files, and where an earlier version of dsmoe did not record it."""

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
    absent = {"origin"} if meta.origin is None else None  # earlier versions refuse what they do not know
    (folder / META).write_text(sealed_json(meta.model_dump(exclude=absent)), encoding="utf-8")


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


def made_folders(cache_dir: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders of source `name` with what the `meta.json` of each says, unchecked: a mapping with a `recipe`."""
    for folder in sorted(cache_dir.glob(f"{glob.escape(name)}-{16 * '[0-9a-f]'}")):
        try:
            check_regular(folder / META)
            content = json.loads((folder / META).read_bytes())
            if isinstance(content["recipe"], dict):
                yield folder, content
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue


def old_formats(cache_dir: Path, name: str) -> Iterator[tuple[Path, object]]:
    """The folders of source `name` that another version of dsmoe has made, and of which format each is."""
    for path, content in made_folders(cache_dir, name):
        version = content["recipe"].get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            yield path, version
