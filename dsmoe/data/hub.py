"""Documents of a Hugging Face hub data set, through `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dsmoe.config.schema import Source
from dsmoe.data.json_records import field_text
from dsmoe.data.source_errors import BadRecord, source_error


def hub_records(source: Source, cache_dir: Path) -> Iterator[str | BadRecord]:
    """Yield the text of every row of a hub data set, or a BadRecord for a row without usable text.

    `datasets` keeps its downloads below `cache_dir`.

    Raises:
        UserError: the data set cannot be opened, or reading a row fails.
    """
    datasets = _import_datasets(cache_dir)
    try:
        rows = datasets.load_dataset(
            source.hub, split=source.split, streaming=True, cache_dir=str(cache_dir / "huggingface" / "datasets")
        )
    except Exception as error:  # of the network or any reader; `datasets` has no base class for them
        raise source_error(
            source,
            "hub",
            f"cannot open data set {source.hub!r}, split {source.split!r} ({_on_one_line(error)}); check both names, "
            "the network (HF_ENDPOINT sets another server) and, for a gated set, HF_TOKEN; or download the files and "
            "give their `path`",
        ) from error
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:
            raise source_error(
                source,
                "hub",
                f"reading {source.hub!r} ended at row {number} ({type(error).__name__}: {_on_one_line(error)}); "
                "try again, or download the files and give their `path`",
            ) from error
        if row is None:
            return
        yield field_text(row, source.text_field, f"{source.hub}, row {number}")
        number += 1


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _import_datasets(cache_dir: Path) -> ModuleType:
    """Import `datasets` without progress bars, with its caches below `cache_dir` unless the environment sets them."""
    folder = cache_dir.absolute() / "huggingface"
    # `datasets` reads these variables once, at its import. HF_HOME stays, because it has the user's access token.
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE"):
        os.environ.setdefault(name, str(folder / name.removeprefix("HF_").removesuffix("_CACHE").lower()))
    import datasets

    datasets.disable_progress_bars()
    # Else every call reports the download to a server, which takes seconds behind a firewall.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets
