"""The run that a checkpoint's manifest records, checked field by field for a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dsmoe.checkpoint.manifest import DamagedError
from dsmoe.config.schema import Optimizer
from dsmoe.config.sections.base import NonNegativeInt, PositiveFloat, PositiveInt
from dsmoe.plan.text import shown


class _Part(BaseModel):
    """The keys of a section of `facts.config` that are used; another version of dsmoe may have further ones."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class SavedSource(_Part):
    """A source of `data.sources`."""

    name: str
    weight: PositiveFloat


class SavedData(_Part):
    """The section `data`."""

    seed: NonNegativeInt
    sources: list[SavedSource] = Field(min_length=1)


class SavedTrain(_Part):
    """The section `train`."""

    batch_tokens: PositiveInt
    sequence_length: PositiveInt
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None

    @property
    def length(self) -> int:
        """Optimizer steps of the run."""
        return self.steps or (self.tokens or 0) // self.batch_tokens

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if self.length < 1:
            raise ValueError("neither steps nor tokens make a run of one step or more")
        return self


class SavedOptimizer(Optimizer):
    """The section `optimizer`."""

    model_config = ConfigDict(extra="ignore")


def recorded(checkpoint: Path, field: str, kind: Any, value: object) -> Any:
    """`value`, which the manifest has in `field` (`facts.config.train`), as a `kind`.

    Raises:
        DamagedError: it is none.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join((field, *map(str, first["loc"])))
        raise DamagedError(f"{checkpoint} is damaged: {shown(where)}: {shown(first['msg'])}") from None
