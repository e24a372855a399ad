"""mergeid's own formats as pydantic models: unknown names are refused, kinds are exact, numbers are finite.

Imported where such a file is read, since pydantic takes a moment to load. What a file gets wrong is one sentence that
says where in it, what is there and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mergeid.errors import MergeidError, cut, shown
from mergeid.plugins import near_names

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[int, Field(gt=-(2**31), lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]


class Own(BaseModel):
    """Of a format of mergeid's own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TensorShape(Own):
    shape: list[Count]


class AxisEntry(Own):
    tensor: str
    axis: Number
    index: list[Annotated[list[Count], Field(min_length=2, max_length=2)] | None]


class TapEntry(Own):
    module: str
    kind: Literal["in", "out"]
    call: Count
    ndim: Number
    dims: list[Number]
    index: list[Annotated[list[Count], Field(min_length=2, max_length=2)] | None]


class SpaceEntry(Own):
    """A space of a graph, or (without axes and taps) of a sketch."""

    id: str
    label: str | None = None
    size: Positive
    blocks: Positive = 1
    parents: list[str] = []
    block_parents: list[list[Count]] | None = None
    axes: list[AxisEntry] = []
    taps: list[TapEntry] = []


class FrozenEntry(Own):
    tensor: str
    axis: Number
    why: str


class GraphFile(Own):
    """``mergeid.graph/1``."""

    format: Literal["mergeid.graph/1"]
    model: str = ""
    versions: dict[str, str] = {}
    tensors: dict[str, TensorShape]
    spaces: list[SpaceEntry]
    share: float | None = None
    frozen: list[FrozenEntry] = []
    unknown_ops: dict[str, Any] = {}
    verified: dict[str, Any] | None = None


class SketchAbout(Own):
    """The metadata of a sketch, whose lists are JSON inside its texts."""

    source: str
    arch: str
    inputs: str
    spaces: list[SpaceEntry]
    names: list[str]
    repairable: bool
    config: dict[str, Any] | None = None


class PointEntry(Own):
    model_config = ConfigDict(allow_inf_nan=True)  # a network that has diverged

    loss: float
    accuracy: float | None
    count: Count


class PointsFile(Own):
    """``mergeid.barrier-points/1``: digest of a curve -> λ -> what was measured."""

    format: Literal["mergeid.barrier-points/1"]
    curves: dict[str, dict[Annotated[float, Field(strict=False)], PointEntry]]


class ZipEntry(Own):
    """What ``mergeid zip`` records of itself."""

    arch: str
    trunk: list[str]
    heads: Count
    share: float
    within: dict[str, float]
    apart: list[str]
    repaired: list[str]
    up_to: str | None
    across: bool
    seed: Count


class ZipRecord(Own):
    """``mergeid.record/1`` of two models with one trunk, which is read again to load them."""

    format: Literal["mergeid.record/1"]
    output: str
    method: Literal["zip"]
    inputs: list[dict[str, Any]]
    zip: ZipEntry
    versions: dict[str, str]


# --- recipes -----------------------------------------------------------------------------------------------------

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
    model: Annotated[str, _text("a path or hub id")]
    parameters: dict[str, Setting] | None = None


class SourceEntry(ModelEntry):
    layer_range: Annotated[list[Count], Field(min_length=2, max_length=2)]


class SliceEntry(Own):
    """Layers of the output, and those that they are merged of."""

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: Annotated[str, _text("a path or hub id")] | None = None
    parameters: dict[str, Setting] | None = None


class ZeroEntry(Own):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelTokenEntry(Own):
    """The row of another token of a model, or one of its rows by number."""

    kind: Literal["model_token"]
    model: Annotated[str, _text("a model of the recipe")]
    token: str | None = None
    token_id: Count | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelTokenEntry:
        if (self.token is None) == (self.token_id is None):
            raise _wanted("either token or token_id")
        return self


def _source_of(value: Any) -> str:
    if not isinstance(value, (dict, ZeroEntry, ModelTokenEntry)):
        return "#model"
    kind = value.get("kind") if isinstance(value, dict) else value.kind
    return "#zero" if kind == "zero" else "#token"


class TokenEntry(Own):
    """Where the row of a token comes from."""

    source: Annotated[
        Annotated[str, _text("a model of the recipe, or a table with kind (model_token, zero)"), Tag("#model")]
        | Annotated[ModelTokenEntry, Tag("#token")]
        | Annotated[ZeroEntry, Tag("#zero")],
        Discriminator(_source_of),
    ]
    force: bool = False


class TokenizerEntry(Own):
    source: Annotated[str, _text("union, base, or a model")] = "union"
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: Positive | None = None


class ModuleEntry(Own):
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None


class RecipeFile(Own):
    """A merge recipe, in mergekit's words."""

    merge_method: Annotated[str, _text("the name of a method (linear, ties, …)")]
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    modules: dict[str, ModuleEntry] | None = None
    name: Annotated[str, _text("a name for later documents of the file")] | None = None
    base_model: Annotated[str, _text("a path or hub id")] | None = None
    parameters: dict[str, Setting] | None = None
    dtype: Annotated[str, _text("float32, float16, bfloat16 or float64")] | None = None
    out_dtype: Annotated[str, _text("float32, float16, bfloat16 or float64")] | None = None
    tokenizer_source: Annotated[str, _text("union, base, or a model")] | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: Annotated[str, _text("auto, chatml, or a template")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if isinstance(key, str) and key in _REFUSED:
                raise PydanticCustomError(
                    "refused", "{key}, which is not supported: {why}", {"key": repr(key), "why": _REFUSED[key]}
                )
        return data


# --- reading -----------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "none_required": "nothing (null)",
    "too_short": "more entries",
    "too_long": "fewer entries",
}


def validated(model: type[M], data: Any, name: str) -> M:
    """What a file says, as a value of its model.

    Args:
        data: parsed JSON or YAML.
        name: what messages call the file.

    Raises:
        MergeidError: the first thing in which it does not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise MergeidError(f"{name}{_sentence(model, error)}") from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # what somebody mistyped says more than what is then missing
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place, kind = first["loc"], first["type"]
    if kind == "extra_forbidden":
        known = _names_at(model, place[:-1])
        near = near_names(str(place[-1]), known, n=3)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        return f"{_where(place[:-1])} has an unknown key {shown(place[-1])}{hint}; expected {', '.join(known)}"
    if kind == "refused":
        return f"{_where(place)} has the key {first['msg']}"
    if kind == "missing":
        return f"{_where(place[:-1])} lacks the key {shown(place[-1])}"
    expected = _EXPECTED.get(kind) or cut(first["msg"][:1].lower() + first["msg"][1:], 200)
    if kind.startswith("model") and (names := _names_at(model, place)):
        expected = f"a table with {', '.join(names)}"
    told = expected if kind in _EXPECTED else expected.removeprefix("input should be ").removeprefix("value error, ")
    return f"{_where(place)} is {shown(first['input'])}; expected {told}"


def _where(place: Sequence[int | str]) -> str:
    """``: spaces[3].axes[0].index``; names of pydantic's own for the members of a union are left out."""
    text = ""
    for part in (p for p in place if not str(p).startswith("#")):
        text += f"[{part}]" if isinstance(part, int) else f".{cut(str(part), 60)}" if text else cut(str(part), 60)
    return f": {text}" if text else ""


def _names_at(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The names that a table at that place may have."""
    found: Any = model
    for part in (p for p in place if not str(p).startswith("#")):
        if isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields:
            found = _models_in(found.model_fields[str(part)].annotation)
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _models_in(annotation: Any) -> Any:
    """The model inside ``list[Model]``, ``dict[str, Model]``, ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_models_in(a) for a in getattr(annotation, "__args__", ()))
    return next((m for m in found if m is not None), None)
