"""`meta.json` of a cache folder: its content, the size and checksum of each file, and a checksum of itself."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe.data.checksummed_files import DamagedCacheError, StoredFile
from dsmoe.runtime.atomic_files import NotAFileError, check_regular, not_a_file
from dsmoe.runtime.checksummed_json import has_valid_checksum, json_with_checksum

META = "meta.json"
FORMAT_VERSION = 2
"""Format 1 had no checksums, and another validation split."""
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
        """Size and checksum as `dsmoe.data.checksummed_files` takes them."""
        return StoredFile(self.bytes, self.xxh128)


class Part(_Strict):
    """The part of a source for training or for validation."""

    tokens: Count
    bytes: Count
    """UTF-8 bytes of the text."""
    documents: Count
    token_file: File
    document_file: File


class Origin(_Strict):
    """A record of the user's files that the tokens were made of."""

    path: str
    """Absolute path of the source."""
    from_cache: str
    """The path relative to the folder of the cache."""
    files: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Digest of the files' names and sizes (`names_and_sizes`)."""
    blake2b: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Digest of all documents, exact and in order (`TextDigest`)."""


class Meta(_Strict):
    """The contents of a `meta.json`, except its checksum of itself."""

    dtype: Literal["<u2", "<u4"]
    max_token: Count
    """No token of either part is larger."""
    is_cut: bool
    """The corpus is a single document, whose end is held out."""
    train: Part
    validation: Part
    recipe: dict[str, Any]
    """Everything that decides the tokens: source, tokenizer, seed and validation fraction."""
    origin: Origin | None = None
    """None for builtin and hub text, and where an earlier version of dsmoe did not record it."""

    def parts(self) -> dict[str, Part]:
        """Return both parts by name."""
        return {"train": self.train, "validation": self.validation}

    def files(self) -> dict[str, StoredFile]:
        """Return all files of the folder except `meta.json`, by name."""
        return {
            file_name: file.stored
            for name, part in self.parts().items()
            for file_name, file in ((token_file(name), part.token_file), (document_file(name), part.document_file))
        }


def token_file(part: str) -> str:
    """Return the name of the token file of `train` or `validation`."""
    return f"{part}.bin"


def document_file(part: str) -> str:
    """Return the name of the file that lists the documents of `train` or `validation`."""
    return f"{part}.documents"


def write_meta(folder: Path, meta: Meta) -> None:
    """Write the folder's `meta.json` with a checksum of itself."""
    absent = {"origin"} if meta.origin is None else None  # earlier versions refuse what they do not know
    (folder / META).write_text(json_with_checksum(meta.model_dump(exclude=absent)), encoding="utf-8")


def read_meta(folder: Path, recipe: Mapping[str, Any]) -> Meta:
    """Read the `meta.json` of a folder that should have been made with `recipe`.

    Raises:
        DamagedCacheError: the file is missing, not what was written, or of another recipe.
        OSError: the file cannot be read.
    """
    try:
        check_regular(folder / META)
        text = (folder / META).read_text(encoding="utf-8")
        content = json.loads(text)
        if not has_valid_checksum(text, content):
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
    """Yield the folders of source `name` with the contents of `meta.json`, unchecked except for having a `recipe`."""
    for folder in sorted(cache_dir.glob(f"{glob.escape(name)}-{16 * '[0-9a-f]'}")):
        try:
            check_regular(folder / META)
            content = json.loads((folder / META).read_bytes())
            if isinstance(content["recipe"], dict):
                yield folder, content
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue


def old_formats(cache_dir: Path, name: str) -> Iterator[tuple[Path, object]]:
    """Yield the folders of source `name` that another version of dsmoe has made, with the format of each."""
    for path, content in made_folders(cache_dir, name):
        version = content["recipe"].get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            yield path, version
