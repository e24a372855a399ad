"""Merge methods: small pure functions on tensors, and the registry that finds them.

A method takes the same tensor of every model (matched already), one weight per model, and as keywords whatever its
registration says that it needs: the base model's tensor, parameters, statistics, a random generator. `linear` stands
here; the others, one file per family, in `mergeid.methods.builtin`. Third-party methods register a `MergeMethod` under
the entry-point group ``mergeid.methods``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union

from mergeid.errors import MergeidError, shown
from mergeid.plugins import near_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import Unpack

    from mergeid.methods.pieces import Formed

ENTRY_POINT_GROUP = "mergeid.methods"
LARGEST_WEIGHT = 1e12
"""Beyond this no share or factor means anything, and sums would overflow."""

Need = Union[bool, float, str, Sequence[Any], "Tensor", "torch.Generator", None]
"""What a method may declare: a parameter, one per model, the base's tensor, statistics, a generator."""
MethodFunction = Callable[..., "Formed"]
"""(tensors, weights, all that the method declares) -> tensor, or the pieces that it is formed in."""


@dataclass(frozen=True)
class Parameter:
    """One number or switch that a method takes besides the weights.

    Attributes:
        name: what users call it (``--set NAME=VALUE``, a recipe's ``parameters``).
        default: its value if nothing is said; its type says what is accepted (bool, int, float or one of `choices`).
        low, high: smallest and largest value.
        choices: the words that a parameter with words for values may have.
        per_model: one value per model, handed over as a list.
        keyword: the function's keyword, where it is not `name`.
        help: what it does, in a few words.
    """

    name: str
    default: float | bool | str
    low: float = -math.inf
    high: float = math.inf
    per_model: bool = False
    keyword: str = ""
    help: str = ""
    choices: tuple[str, ...] = ()

    def checked(self, value: Any) -> float | bool | str:
        """The value in the parameter's type.

        Raises:
            MergeidError: another type, not finite, or out of range.
        """
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
            raise MergeidError(f"parameter {self.name!r} is {shown(value)}; expected one of {', '.join(self.choices)}")
        kind = type(self.default)
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise MergeidError(f"parameter {self.name!r} is {shown(value)}; expected true or false")
        wanted = "a whole number" if kind is int else "a number"
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        high = min(self.high, LARGEST_WEIGHT)  # compared as they are: a whole number may be beyond every float
        if not number or not max(self.low, -high) <= value <= high or (kind is int and value != int(value)):
            beyond = number and abs(value) > LARGEST_WEIGHT
            bounds = f" of at most {LARGEST_WEIGHT:g}" if beyond else self._range()
            raise MergeidError(f"parameter {self.name!r} is {shown(value)}; expected {wanted}{bounds}")
        return kind(value)

    def _range(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return ""
        return f" from {self.low:g}" + ("" if math.isinf(self.high) else f" to {self.high:g}")


@dataclass(frozen=True)
class MergeMethod:
    """One way to combine the same tensor of several models.

    Attributes:
        name: what ``--method`` calls it.
        function: (tensors of equal shape, one weight each, declared keywords) -> tensor of that shape, in the widest of
            their dtypes; or the pieces that it is formed in (`mergeid.methods.pieces`), so that it is never whole in
            memory.
        elementwise: whether each element of the result depends on that element of the inputs alone; then it is called
            piece by piece.
        shows: whether NaN and infinity in any input always show in the result; else the inputs are looked at before.
        weights: "shares" must sum to 1; "free" are factors of any size; "ignored" are not looked at.
        base: whether it needs the base model (keyword ``base``: that tensor of it); "optional": with one it merges the
            task vectors, without one the models (keyword ``base`` is None).
        parameters: what else it takes, each as a keyword.
        statistics: "gram" or "fisher" (`mergeid.methods.statistics`): it needs calibration data (keyword
            ``statistics``: one tensor per model, or None where there is none for this tensor).
        seeded: whether it draws random numbers (keyword ``generator``, seeded by the tensor's name).
        least, most: smallest (beside a base) and largest number of models; None: any.
        scales: whether shares of another sum than 1 mean something (the sum, scaled).
        ordered: whether it brings what the second model adds into the first; recipes call the first ``base_model``.
        options: the frozen dataclass in which the function takes all keywords as one argument; None: one by one.
    """

    name: str
    function: MethodFunction
    elementwise: bool = True
    weights: Literal["shares", "free", "ignored"] = "shares"
    base: bool | Literal["optional"] = False
    parameters: Sequence[Parameter] = ()
    statistics: Literal["gram", "fisher"] | None = None
    seeded: bool = False
    most: int | None = None
    scales: bool = False
    ordered: bool = False
    options: type | None = None
    least: int = 1
    shows: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float], **needs: Need) -> Tensor:
        """The merged tensor; `needs`: what this method declares."""
        from mergeid.methods.pieces import whole

        return whole(self.formed(tensors, weights, **needs))

    def formed(self, tensors: Sequence[Tensor], weights: Sequence[float], **needs: Need) -> Formed:
        """The merged tensor, or its pieces (arguments as for the function)."""
        if self.options is not None:
            defaults = {p.keyword or p.name: p.default for p in self.parameters if not p.per_model}
            return self.function(tensors, weights, self.options(**{**defaults, **needs}))
        return self.function(tensors, weights, **needs)

    def parameter(self, name: str) -> Parameter:
        """The parameter of that name. Raises `MergeidError` for an unknown one, with near names."""
        known = {p.name: p for p in self.parameters}
        if name in known:
            return known[name]
        near = near_names(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        takes = f"expected one of {', '.join(known)}" if known else "it takes none"
        raise MergeidError(f"method {self.name!r} has no parameter {name!r}{hint}; {takes}")


class Traits(TypedDict, total=False):
    """What is said of a method when it is registered: the attributes of `MergeMethod` of these names."""

    elementwise: bool
    weights: Literal["shares", "free", "ignored"]
    base: bool | Literal["optional"]
    parameters: Sequence[Parameter]
    statistics: Literal["gram", "fisher"] | None
    seeded: bool
    most: int | None
    scales: bool
    ordered: bool
    options: type | None
    least: int
    shows: bool


_registered: dict[str, MergeMethod] = {}


def register_method(name: str, **traits: Unpack[Traits]) -> Callable[[MethodFunction], Callable[..., Tensor]]:
    """Decorator: register a merge function (arguments: see `MergeMethod`). Called by its name it gives whole tensors.
    Raises ValueError on a duplicate name."""

    def add(function: MethodFunction) -> Callable[..., Tensor]:
        if name in _registered:
            raise ValueError(f"merge method {name!r} is registered already")
        _registered[name] = MergeMethod(name, function, **traits)

        @functools.wraps(function)
        def called(*tensors: Any, **needs: Need) -> Tensor:
            from mergeid.methods.pieces import whole

            return whole(function(*tensors, **needs))

        return called

    return add


@cache
def _entry_points() -> dict[str, Callable[[], MergeMethod]]:
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)
    return {e.name: e.load for e in found}


def _load_families() -> None:
    """The families import torch, so that they are imported only when a method other than `linear` is asked for."""
    import_module("mergeid.methods.builtin")


def method_names() -> list[str]:
    """Names of all merge methods, without importing third-party ones."""
    _load_families()
    return sorted({*_registered, *_entry_points()})


def get_method(name: str) -> MergeMethod:
    """The method of that name. Raises `MergeidError` for an unknown one."""
    if name not in _registered:
        _load_families()
    if name in _registered:
        return _registered[name]
    if name not in _entry_points():
        names = method_names()
        near = near_names(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MergeidError(f"unknown merge method {name!r}{hint}; expected one of {', '.join(names)}")
    _registered[name] = _entry_points()[name]()
    return _registered[name]


def check_base(method: MergeMethod, given: bool) -> None:
    """Raises `MergeidError` where a method needs a base model and none is given, or the other way round."""
    if method.base is True and not given:
        raise MergeidError(
            f"method {method.name!r} needs the model that the others were fine-tuned from; name it with --base"
        )
    if given and not method.base:
        raise MergeidError(f"method {method.name!r} uses no base model; leave out --base, or choose another --method")


def check_weights(
    weights: Sequence[float], models: int, *, normalize: bool | None = None, free: bool = False
) -> list[float]:
    """One finite weight per model, with sum 1 to the last digit unless they are free.

    Args:
        weights: as given by the user.
        models: how many models there are.
        normalize: True: scale them to sum 1 instead of refusing them; False: take them as they are.
        free: any sum will do (`MergeMethod.weights`).

    Raises:
        MergeidError: a wrong number of weights, a weight that is no number, or a sum that is not 1 (within 1e-6;
            what rounding leaves is scaled away).
    """
    if not all(isinstance(w, Real) and -LARGEST_WEIGHT <= w <= LARGEST_WEIGHT for w in weights):
        named, most = " + ".join(shown(w) for w in weights), f"{LARGEST_WEIGHT:g}"
        raise MergeidError(f"weights {named} cannot be used; expected numbers of at most {most} (option --weights)")
    weights = [float(w) for w in weights]
    told = " + ".join(f"{w:g}" for w in weights)
    if len(weights) != models:
        raise MergeidError(
            f"{len(weights)} weights given ({told}) for {models} models; expected one per model (option --weights)"
        )
    if (free and not normalize) or normalize is False:
        return weights
    total = math.fsum(weights)
    if not normalize and abs(total - 1) > 1e-6:
        raise MergeidError(
            f"weights {told} sum to {total:g}, expected 1; change them (option --weights), or pass --normalize, or "
            "--no-normalize to take them as they are"
        )
    if abs(total) < 1e-12:
        raise MergeidError(f"weights {told} sum to 0 and cannot be normalised; change them")
    return [w / total for w in weights]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add numbers of `dtype` in: float64 for 32 bits and more, float32 for 16 bits."""
    import torch

    if dtype.is_complex:
        return torch.complex128
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


@register_method("linear", scales=True, shows=True)
def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum ``Σ_i w_i x_i``, rounded once.

    Products and sums are separate roundings in a wider format (no fused multiply-add), so the result does not
    depend on how the tensor is cut into pieces or on the number of threads. With weights in [0, 1] that sum to 1,
    ``linear([x, x], w)`` is x bit for bit, and equal weights give the plain average ``(a + b) / 2`` bit for bit.
    With float64 inputs, or weights outside [0, 1], no wider format guarantees the former: there elements on
    which all models agree are kept as they are.

    Args:
        tensors: floating-point (or complex) tensors of equal shape.
        weights: one per tensor.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all inputs exactly.
    """
    import torch

    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    weights = [w + 0.0 for w in weights]  # -0.0 would turn the sign of zeros
    convex = all(0 <= w <= 1 for w in weights)
    wide = accumulator(dtype) if convex or dtype.is_complex else torch.float64
    total = tensors[0].to(wide, copy=True).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(wide, copy=True).mul_(weight))
    result = total.to(dtype)
    if (not convex or wide == dtype) and math.isclose(math.fsum(weights), 1, abs_tol=1e-9):
        first = tensors[0].to(dtype)
        agreed = functools.reduce(torch.logical_and, (first == t for t in tensors[1:]))
        result = torch.where(agreed, first, result)
    return result
