"""A recipe in mergekit's words, as a pydantic model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mergeid.io.model_names import ModelName
from mergeid.io.schema import Count, Own, Positive

_REFUSED = {
    "experts": "mixtures of experts are made by mergeid moe",
    "gate_mode": "mixtures of experts are made by mergeid moe",
}
"""Keys of mergekit's recipes that mean something else than merging aligned models."""
_SETTING = "a number, true or false, a list of numbers, or conditions with filter and value"
_WORD = re.compile(r"[a-z][a-z0-9_]{0,30}")
_HUGE = 1e30
"""Beyond this no weight, share or factor means anything."""


def _wanted(expected: str) -> PydanticCustomError:
    return PydanticCustomError("wanted", "{expected}", {"expected": expected})


def _number(value: Any) -> bool | int | float | str:
    """YAML reads 1e-5 as text. Words are for the method to judge."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            if _WORD.fullmatch(value):
                answer: bool | int | float | str = value
                return answer
            raise _wanted(_SETTING) from None
    if not isinstance(value, (bool, int, float)):
        raise _wanted(_SETTING)
    if not -_HUGE <= value <= _HUGE:
        raise _wanted(f"a number between -{_HUGE:g} and {_HUGE:g}")
    return value


def _text(expected: str) -> PlainValidator:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise _wanted(expected)
        return value

    return PlainValidator(check, json_schema_input_type=str)


def _kind_of(value: Any) -> str:
    if isinstance(value, (dict, ConditionEntry)):
        return "#condition"
    if not isinstance(value, list):
        return "#number"
    return "#conditions" if any(isinstance(v, dict) for v in value) else "#gradient"


def _not_empty(value: Any) -> Any:
    if isinstance(value, list) and not value:
        raise PydanticCustomError("wanted", "numbers, or conditions with filter and value")
    return value


Scalar = Annotated[
    Any,
    PlainValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "boolean"}, {"type": "string"}]}),
]
Values = Annotated[
    Annotated[Scalar, Tag("#number")] | Annotated[list[Scalar], Tag("#gradient")],
    Discriminator(lambda v: "#gradient" if isinstance(v, list) else "#number"),
    BeforeValidator(_not_empty),
]


class ConditionEntry(Own):
    """The value for tensors with `filter` in their name."""

    filter: Annotated[str, _text("part of the names of tensors")] | None = None
    value: Values


Setting = Annotated[
    Annotated[Scalar, Tag("#number")]
    | Annotated[list[Scalar], Tag("#gradient")]
    | Annotated[ConditionEntry, Tag("#condition")]
    | Annotated[list[ConditionEntry], Tag("#conditions")],
    Discriminator(_kind_of),
    BeforeValidator(_not_empty),
]


class ModelEntry(Own):
    model: ModelName
    parameters: dict[str, Setting] | None = None


class SourceEntry(ModelEntry):
    layer_range: Annotated[list[Count], Field(min_length=2, max_length=2)]


class SliceEntry(Own):
    """Layers of the output, and those that they are merged of."""

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: ModelName | None = None
    residual_weight: float | None = None
    parameters: dict[str, Setting] | None = None


class ZeroEntry(Own):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelTokenEntry(Own):
    """The row of another token of a model, or one of its rows by number."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: Count | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelTokenEntry:
        if (self.token is None) == (self.token_id is None):
            raise _wanted("either token or token_id")
        return self


def _source_of(value: Any) -> str:
    if not isinstance(value, (dict, ZeroEntry, ModelTokenEntry)) or (isinstance(value, dict) and "kind" not in value):
        return "#model"
    kind = value.get("kind") if isinstance(value, dict) else value.kind
    return "#zero" if kind == "zero" else "#token"


class TokenEntry(Own):
    """Where the row of a token comes from."""

    source: Annotated[
        Annotated[ModelName, Tag("#model")]
        | Annotated[ModelTokenEntry, Tag("#token")]
        | Annotated[ZeroEntry, Tag("#zero")],
        Discriminator(_source_of),
    ]
    force: bool = False


class TokenizerEntry(Own):
    source: ModelName = "union"
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: Positive | None = None


class ModuleEntry(Own):
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    parameters: dict[str, Setting] | None = None


class RecipeFile(Own):
    """A merge recipe, in mergekit's words."""

    merge_method: Annotated[str, _text("the name of a method (linear, ties, …)")]
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    modules: dict[str, ModuleEntry] | None = None
    name: Annotated[str, _text("a name for later documents of the file")] | None = None
    base_model: ModelName | None = None
    parameters: dict[str, Setting] | None = None
    dtype: Annotated[str, _text("float32, float16, bfloat16 or float64")] | None = None
    out_dtype: Annotated[str, _text("float32, float16, bfloat16 or float64")] | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: Annotated[str, _text("auto, alpaca, chatml, exaone, llama3, mistral, or a template")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if isinstance(key, str) and key in _REFUSED:
                raise PydanticCustomError(
                    "refused", "{key}, which is not supported: {why}", {"key": repr(key), "why": _REFUSED[key]}
                )
        return data
