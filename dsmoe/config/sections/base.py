"""The base of every section of a config, the kinds of value that keys have, and what changing a key does to a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from dsmoe.config.errors import UserError
from dsmoe.config.suggestions import closest_key

Level = Literal["tensor", "math", "step", "free"]


@dataclass(frozen=True)
class Switch:
    """What of a key's value decides whether there are certain tensors beside the weights.

    Attributes:
        said: the condition, as messages have it behind the key: `is above 0`.
        is_on: whether a value meets it.
        level: of a change from a value that meets it to one that does not, or back: `tensor`, or `step` where weights
            are of use without these tensors, which then begin anew.
    """

    said: str
    is_on: Callable[[Any], bool]
    level: Level


@dataclass(frozen=True)
class Effect:
    """What another value of a key does to a run that has begun; every key has one.

    Attributes:
        level: `tensor`: other tensors, or tensors that mean something else; no weights can be taken over.
            `step`: steps of another size, so that the place in the data is another; weights can be taken over.
            `math`: steps that compute something else; another run, which can begin from a checkpoint of this one.
            `free`: the same run, which may go on so.
        switch: of a key whose values are alike but for a few, what these decide.
    """

    level: Level
    switch: Switch | None = None

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The key's part of the JSON Schema, with the level: `"x-effect": "math"`."""
        return {**handler(schema), "x-effect": self.level}


T = TypeVar("T")
TensorEffect = Annotated[T, Effect("tensor")]
StepEffect = Annotated[T, Effect("step")]
MathEffect = Annotated[T, Effect("math")]
NoEffect = Annotated[T, Effect("free")]


def whole_number(value: object) -> object:
    """Let `1e9` stand for an integer (YAML reads it as a float), and keep `true` from standing for 1."""
    if isinstance(value, bool):
        raise ValueError("a bool is not a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _zero_is_never(value: object) -> object:
    """Let 0 switch off what happens at an interval."""
    return None if value == 0 and not isinstance(value, bool) else value


# Upper limits are far above what anybody trains, and low enough for arithmetic on every value to end at once.
PositiveInt = Annotated[int, Field(ge=1, le=10**18), BeforeValidator(whole_number)]
Interval = Annotated[
    PositiveInt | None,
    BeforeValidator(_zero_is_never),
    WithJsonSchema({"anyOf": [{"minimum": 0, "type": "integer"}, {"type": "null"}]}),
]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**18), BeforeValidator(whole_number)]
Width = Annotated[int, Field(ge=1, le=2**24), BeforeValidator(whole_number)]
MOST_TOKENS = 2**31
"""Of a vocabulary, and of a sequence."""
Length = Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(whole_number)]
Layers = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(whole_number)]
Devices = Annotated[int, Field(ge=1, le=2**20), BeforeValidator(whole_number)]
Timeout = Annotated[int, Field(ge=1, le=10**6), BeforeValidator(whole_number)]
"""Seconds: eleven days, of which the milliseconds fit the 32 bits that torch's store and gloo count them in."""
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(gt=0, lt=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
"""Of a folder, with room for what is put before and behind it: file systems take 255 bytes."""
Text = Annotated[str, Field(min_length=1)]
"""Of a path or a name: an empty one, as a variable that is set to nothing leaves, would stand for something else."""


class Section(BaseModel):
    """A frozen mapping that refuses keys it does not know; numbers are not accepted as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        """Make a section in Python; the loader has its own words for what is wrong in a file.

        Raises:
            UserError: some values cannot be; a line for each, with its key and the value.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("\n".join(map(self._refusal, error.errors(include_url=False)))) from None

    # So that pydantic does not call it for the sections within others, whose errors need their place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _refusal(cls, found: Any) -> str:
        key = ".".join(map(str, found["loc"]))
        if found["type"] != "extra_forbidden":
            return f"{cls.__name__}: {key} ({found['input']!r}): {found['msg']}"
        meant = closest_key(key, cls.model_fields) if len(found["loc"]) == 1 else ""
        return f"{cls.__name__}: {key}: unknown; {f'did you mean {meant!r}?' if meant else ', '.join(cls.model_fields)}"
