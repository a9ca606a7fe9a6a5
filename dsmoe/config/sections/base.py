"""Base class of all sections, types of values with their limits, and effects of changing a key."""

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
    """A condition on a key's value that decides whether certain tensors exist beside the weights.

    Attributes:
        condition: the condition as it follows the key in messages: `is above 0`.
        is_on: returns whether a value meets the condition.
        level: effect of a change across the condition: `tensor`, or `step` if weights are of use without these tensors,
            which then begin anew.
    """

    condition: str
    is_on: Callable[[Any], bool]
    level: Level


@dataclass(frozen=True)
class Effect:
    """The effect of changing a key on a run that has begun; every key has one.

    Attributes:
        level: `tensor`: other tensors, or tensors with another meaning; no weights can be taken over.
            `step`: steps of another size, and so another position in the data; weights can be taken over.
            `math`: steps that compute something else; another run, which can begin from a checkpoint of this one.
            `free`: the same run, which may go on.
        switch: a condition on the value whose change has an effect of its own. With `Effect("math", switch)` and the
            switch "is above 0" of level `tensor`: 0.1 to 0.2 is `math`, 0 to 0.1 is `tensor`.
    """

    level: Level
    switch: Switch | None = None

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the key's part of the JSON Schema with the level added: `"x-effect": "math"`."""
        return {**handler(schema), "x-effect": self.level}


T = TypeVar("T")
TensorEffect = Annotated[T, Effect("tensor")]
StepEffect = Annotated[T, Effect("step")]
MathEffect = Annotated[T, Effect("math")]
NoEffect = Annotated[T, Effect("free")]


def whole_number(value: object) -> object:
    """Turn a whole float, as YAML reads `1e9`, into an integer, and refuse `true`, which Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError("a bool is not a number")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _zero_is_never(value: object) -> object:
    """Turn an interval of 0 into None, which means never."""
    return None if value == 0 and not isinstance(value, bool) else value


# Upper limits are far above what anybody trains, and low enough that arithmetic on every value is fast.
PositiveInt = Annotated[int, Field(ge=1, le=10**18), BeforeValidator(whole_number)]
Interval = Annotated[
    PositiveInt | None,
    BeforeValidator(_zero_is_never),
    WithJsonSchema({"anyOf": [{"minimum": 0, "type": "integer"}, {"type": "null"}]}),
]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**18), BeforeValidator(whole_number)]
Width = Annotated[int, Field(ge=1, le=2**24), BeforeValidator(whole_number)]
MOST_TOKENS = 2**31
"""The most tokens of a vocabulary or a sequence."""
Length = Annotated[int, Field(ge=1, le=MOST_TOKENS), BeforeValidator(whole_number)]
Layers = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(whole_number)]
Devices = Annotated[int, Field(ge=1, le=2**20), BeforeValidator(whole_number)]
Timeout = Annotated[int, Field(ge=1, le=10**6), BeforeValidator(whole_number)]
"""Seconds, at most eleven days: torch's store and gloo count milliseconds in 32 bits."""
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(gt=0, lt=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
"""Name of a folder, with room for a prefix and a suffix: file systems take 255 bytes."""
Text = Annotated[str, Field(min_length=1)]
"""A path or a name, not empty: an empty path, as from an empty variable, would mean the working directory."""


class Section(BaseModel):
    """A frozen mapping that refuses unknown keys; strings are not accepted as numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        """Make a section in Python; the loader words the problems of a file itself.

        Raises:
            UserError: some values are invalid; a line for each, with its key and the value.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("\n".join(map(self._refusal, error.errors(include_url=False)))) from None

    # Keeps pydantic from calling this __init__ for nested sections, whose errors need their full path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _refusal(cls, found: Any) -> str:
        key = ".".join(map(str, found["loc"]))
        if found["type"] != "extra_forbidden":
            return f"{cls.__name__}: {key} ({found['input']!r}): {found['msg']}"
        meant = closest_key(key, cls.model_fields) if len(found["loc"]) == 1 else ""
        return f"{cls.__name__}: {key}: unknown; {f'did you mean {meant!r}?' if meant else ', '.join(cls.model_fields)}"
