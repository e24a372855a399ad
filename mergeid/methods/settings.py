"""What a merge method is told for each tensor: weights and parameters that may differ by name and by depth.

A setting is one of

- a number or switch, the same everywhere;
- a *gradient*: a list of numbers, interpolated over the depth of the network, first layer to last;
- *conditions*: a list of `Condition`; the first that matches the tensor's name counts.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Union

from mergeid.errors import MergeidError, MergeidWarning, listed, shown
from mergeid.methods.registry import MergeMethod, Need, check_weights

if TYPE_CHECKING:
    import torch

Scalar = Union[bool, int, float]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name matches.

    Attributes:
        value: number, switch or gradient.
        pattern: glob on the whole name (``*.mlp.*``).
        required: whether it is an error if no tensor matches; else only a warning.
    """

    value: Scalar | tuple[Scalar, ...]
    pattern: str = "*"
    required: bool = True


@dataclass(frozen=True)
class ByName:
    """A value for every tensor by its whole name, evaluated already (slices have depths and parameters of their own).

    Attributes:
        values: name -> value.
    """

    values: Mapping[str, Scalar]


Setting = Union[Scalar, tuple[Scalar, ...], tuple[Condition, ...], ByName]
Parameters = Mapping[str, Union[Setting, Sequence[Setting]]]
"""By name: one setting, or one per model."""

_NUMBERED = re.compile(r"^(.*?)\.(\d{1,9})\.")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor stands between the first layer (0) and the last (1), read off its name.

    A layer is the first number in the name (``encoder.layer.7.output.dense.weight``), counted within its own list
    (``encoder.layer``); the only layer of a list stands at 1, and what lies outside of layers (embeddings, final norms,
    heads) at 0, as in mergekit.
    """
    found: dict[str, float] = {}
    numbered: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match is None:
            found[name] = 0.0
        else:
            place, index = match.group(1), int(match.group(2))
            numbered[name] = place, index
            last[place] = max(last.get(place, 0), index)
    return {**found, **{n: i / last[p] if last[p] else 1.0 for n, (p, i) in numbered.items()}}


def evaluate(setting: Setting, name: str, depth: float) -> Scalar | None:
    """The value of a setting for one tensor; None where no condition matches."""
    if isinstance(setting, ByName):
        return setting.values.get(name)
    if not isinstance(setting, tuple):
        return setting
    conditions = [c for c in setting if isinstance(c, Condition)]
    if conditions:
        found = next((c for c in conditions if fnmatchcase(name, c.pattern)), None)
        return None if found is None else evaluate(found.value, name, depth)
    values = [v for v in setting if not isinstance(v, Condition)]
    place = depth * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    if any(isinstance(v, (bool, str)) for v in values):  # steps
        return values[low]
    try:
        return (1 - (place - low)) * values[low] + (place - low) * values[high]
    except (TypeError, OverflowError):
        raise MergeidError(
            f"the values {listed(map(shown, values))} cannot form a gradient over the layers; expected numbers"
        ) from None


@dataclass(frozen=True)
class MergeSettings:
    """Everything a method is told besides the tensors.

    Attributes:
        method: the method.
        weights: one setting per model.
        parameters: parameter -> setting, or one setting per model for parameters that differ by model.
        normalize: True: scale the weights to sum 1, tensor by tensor; False: take them as they are; None: expect sum 1
            where the method's weights are shares.
        seed: of the methods that draw.
        added: names of tensors that are added up, whatever the method (`mergeid.models.both_heads`).
    """

    method: MergeMethod
    weights: tuple[Setting, ...]
    parameters: Parameters = field(default_factory=dict)
    normalize: bool | None = None
    seed: int = 0
    depth: dict[str, float] = field(default_factory=dict)
    added: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        method: MergeMethod,
        models: int,
        names: Iterable[str],
        *,
        weights: Sequence[Setting] | None = None,
        parameters: Parameters | None = None,
        normalize: bool | None = None,
        seed: int = 0,
    ) -> MergeSettings:
        """Settings checked for every tensor that will be merged, before anything is done.

        Args:
            models: how many there are, the base not counted.
            names: of the tensors that will be merged.
            weights: default: equal shares.

        Raises:
            MergeidError: too many models, unknown parameters, values out of range, weights that do not sum to 1 or of
                a wrong number, a pattern that matches no tensor.
        """
        if method.most is not None and models > method.most:
            raise MergeidError(
                f"method {method.name!r} merges {method.most} models, got {models}; choose another method (karcher "
                f"is similar and takes more)"
                if method.name == "slerp"
                else f"method {method.name!r} merges at most {method.most} models, got {models}"
            )
        if normalize is False and method.weights == "shares" and not method.scales:
            raise MergeidError(
                f"method {method.name!r} needs weights that sum to 1; scale them (normalize), or use linear"
            )
        given = tuple(weights) if weights is not None else (1 / models,) * models
        found = cls(method, given, dict(parameters or {}), normalize, seed, depths(names))
        found._check(models)
        return found

    def _check(self, models: int) -> None:
        if len(self.weights) != models:
            shown = " + ".join(f"{w:g}" if isinstance(w, (int, float)) else "…" for w in self.weights)
            raise MergeidError(
                f"{len(self.weights)} weights given ({shown}) for {models} models; expected one per model "
                "(option --weights)"
            )
        for name, setting in self.parameters.items():
            parameter = self.method.parameter(name)
            if isinstance(setting, list) and not parameter.per_model:
                raise MergeidError(f"parameter {name!r} is one for all models; expected one value, got {len(setting)}")
            if isinstance(setting, list) and len(setting) != models:
                raise MergeidError(
                    f"{len(setting)} values given for {name!r} and {models} models; expected one, or one per model"
                )
        for pattern, required in self._patterns().items():
            if not any(fnmatchcase(name, pattern) for name in self.depth):
                text = f"the pattern {pattern!r} matches no tensor that is merged; check the pattern"
                if required:
                    raise MergeidError(text)
                warnings.warn(text, MergeidWarning, stacklevel=4)
        for name in self.depth:
            self.weights_of(name)
            self.keywords(name)

    def _patterns(self) -> dict[str, bool]:
        settings: list[Any] = [*self.weights]
        for setting in self.parameters.values():
            settings += setting if isinstance(setting, list) else [setting]
        return {c.pattern: c.required for s in settings if isinstance(s, tuple) for c in s if isinstance(c, Condition)}

    def weights_of(self, name: str) -> list[float]:
        """One weight per model for this tensor."""
        if name in self.added:
            return [1.0] * len(self.weights)
        values = []
        for setting in self.weights:
            value = evaluate(setting, name, self.depth.get(name, 0.0))
            if value is None:
                raise MergeidError(f"no weight is given for tensor {name!r}; add one without a pattern (or for '*')")
            values.append(value)
        return check_weights(values, len(values), normalize=self.normalize, free=self.method.weights != "shares")

    def keywords(self, name: str) -> dict[str, Need]:
        """The method's parameters for this tensor, by keyword."""
        found: dict[str, Need] = {}
        for parameter in self.method.parameters:
            setting = self.parameters.get(parameter.name, parameter.default)
            several: list[Any] = setting if isinstance(setting, list) else [setting] * len(self.weights)
            values = []
            for one in several if parameter.per_model else several[:1]:
                value = evaluate(one, name, self.depth.get(name, 0.0))
                values.append(parameter.checked(parameter.default if value is None else value))
            found[parameter.keyword or parameter.name] = values if parameter.per_model else values[0]
        return found

    def generator(self, name: str) -> torch.Generator:
        """A generator that depends on the seed and the tensor's name alone."""
        import torch

        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @property
    def constant(self) -> bool:
        """Whether every tensor gets the same weights."""
        return not any(isinstance(w, (tuple, ByName)) for w in self.weights)

    def to_json(self) -> dict[str, Any]:
        """Weights and parameters as plain values."""
        return {
            "weights": [_plain(w) for w in self.weights],
            "parameters": {
                n: [_plain(s) for s in v] if isinstance(v, list) else _plain(v)  # type: ignore[arg-type]
                for n, v in self.parameters.items()
            },
            "normalize": self.normalize,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class MethodRequest:
    """A merge method and what the user tells it, before the tensors are known.

    Attributes:
        method: the method.
        weights: one setting per model; None: equal shares.
        parameters: of the method, by name.
        normalize: True: scale the weights to sum 1; False: take them as they are; None: refuse shares of another sum.
        seed: of methods that draw.
        added: names of tensors that are added up, whatever the method.
    """

    method: MergeMethod
    weights: Sequence[Setting] | None = None
    parameters: Parameters = field(default_factory=dict)
    normalize: bool | None = None
    seed: int = 0
    added: frozenset[str] = frozenset()

    def over(self, models: int, names: Iterable[str]) -> MergeSettings:
        """The settings for so many models and these tensors. Raises `MergeidError` as `MergeSettings.of` does."""
        found = MergeSettings.of(
            self.method,
            models,
            [n for n in names if n not in self.added],
            weights=self.weights,
            parameters=self.parameters,
            normalize=self.normalize,
            seed=self.seed,
        )
        return replace(found, added=self.added)


def setting_of_weights(weights: Sequence[Any] | Mapping[str, Sequence[float]] | None) -> list[Any] | None:
    """One setting per model from weights as users give them: one number per model, or glob -> one number per model."""
    if weights is None or not isinstance(weights, Mapping):
        return None if weights is None else [w.item() if getattr(w, "shape", None) == () else w for w in weights]
    for pattern, values in weights.items():
        if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not all(map(_is_number, values)):
            raise MergeidError(
                f"weights for {shown(pattern)} are {shown(values)}; expected one number per model (option --weights)"
            )
    counts = {len(values) for values in weights.values()}
    if len(counts) != 1:
        given = ", ".join(f"{len(v)} for {k!r}" for k, v in weights.items())
        raise MergeidError(
            f"different numbers of weights: {given or 'none'}; expected one per model (option --weights)"
        )
    return [
        tuple(Condition(float(values[i]), pattern) for pattern, values in weights.items()) for i in range(counts.pop())
    ]


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and getattr(value, "shape", ()) == ()


def _plain(setting: Setting) -> Any:
    if isinstance(setting, ByName):
        return dict(setting.values)
    if not isinstance(setting, tuple):
        return setting
    return [{"pattern": c.pattern, "value": _plain(c.value)} if isinstance(c, Condition) else c for c in setting]
