"""mergeid's own formats as pydantic models: unknown names are refused, kinds are exact, numbers are finite.

Imported where such a file is read, since pydantic takes a moment to load. What a file gets wrong is one sentence that
says where in it, what is there and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

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


class RecordConfigs(Own):
    """Whose config counts where several differed, and what was overruled."""

    from_: Annotated[str, Field(alias="from")]
    overruled: list[dict[str, Any]]


class RecordResized(Own):
    """A model that was made for images of another size, heights and widths, and its tensors that were resampled."""

    source: str
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    to: Annotated[list[Count], Field(min_length=2, max_length=2)]
    tensors: list[str]


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
    config: RecordConfigs | None = None
    resized: list[RecordResized] = []


class ZipRecord(Own):
    """``mergeid.record/1`` of two models with one trunk, which is read again to load them."""

    format: Literal["mergeid.record/1"]
    output: str
    method: Literal["zip"]
    inputs: list[dict[str, Any]]
    zip: ZipEntry
    versions: dict[str, str]


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
