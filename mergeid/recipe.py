"""Merge recipes: a YAML file that says what is merged and how, in the words of mergekit where the meaning is the same.

    merge_method: ties
    base_model: base/
    models:
      - {model: a/, parameters: {weight: 0.6, density: 0.5}}
      - {model: b/, parameters: {weight: [0.2, 0.8]}}     # a gradient over the layers
    parameters:
      density:
        - {filter: mlp, value: 0.3}                       # tensors with "mlp" in their name
        - value: 0.7
    dtype: bfloat16

So mergekit's own recipes are read for the methods that both have: scalars, gradients (lists of numbers, interpolated
from the first layer to the last) and conditions (`filter`, part of a tensor's name; the first that matches counts); a
model's parameters come before those of the recipe. Where defaults differ, a recipe has mergekit's. Three things differ
in the result: sums are taken in float32 or float64 whatever `dtype` says; DARE divides by the density, as its paper
does, where mergekit restores the L1 norm; and the output follows the first model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeid.errors import MergeidError, MergeidWarning
from mergeid.merge.methods import MergeMethod, get_method
from mergeid.merge.settings import Condition, Setting
from mergeid.plugins import near_names

_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_REFUSED = {
    "slices": "stacking slices of layers is not a merge of aligned models",
    "modules": "only whole models are merged",
    "tokenizer": "the tokenizer is the first model's",
    "chat_template": "the chat template is the first model's",
    "experts": "mixtures of experts are not built",
    "gate_mode": "mixtures of experts are not built",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dare_ties": {"normalize": False},
    "karcher": {"max_iter": 10, "tol": 1e-5},
}
"""mergekit's, where they are not ours."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, as arguments of `mergeid.merge`.

    Attributes:
        models: what to merge, the base not among them.
        method: name in the registry.
        base: the base model, for methods that need one.
        weights: one setting per model; None: equal shares.
        parameters: of the method.
        normalize: scale the weights to sum 1.
        dtype: of the output.
    """

    models: list[str]
    method: str
    base: str | None = None
    weights: list[Setting] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    normalize: bool = False
    dtype: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Everything but the models."""
        return {
            "method": self.method,
            "base": self.base,
            "weights": self.weights,
            "parameters": self.parameters,
            "normalize": self.normalize,
            "dtype": self.dtype,
        }


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Raises:
        MergeidError: no such file, no YAML, unknown or refused keys, values of another kind than expected.
    """
    import yaml

    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MergeidError(f"no such file or folder: {name}; expected a recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MergeidError(f"{name} cannot be read as text ({error}); expected a recipe in YAML") from None
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise MergeidError(f"{name} is not valid YAML{where}: {problem}; expected a recipe") from None
    return parse_recipe(parsed, name)


def parse_recipe(parsed: Any, name: str = "the recipe") -> Recipe:
    """A recipe from parsed YAML; `name` is what messages call it. Raises `MergeidError` as `read_recipe` does."""
    table = _table(parsed, name, _KEYS)
    if not isinstance(table.get("merge_method"), str):
        raise MergeidError(f"{name} names no method; expected merge_method: linear, ties, …")
    try:
        method = get_method(table["merge_method"])
    except MergeidError as error:
        raise MergeidError(f"{name}: {error}") from None
    if table.get("tokenizer_source") is not None:
        warnings.warn(
            f"{name}: tokenizer_source is ignored, the tokenizer is the first model's", MergeidWarning, stacklevel=3
        )
    base = table.get("base_model")
    if base is not None and not isinstance(base, str):
        raise MergeidError(f"{name}: base_model is {base!r}; expected a path or hub id")
    models, own = _models(table.get("models"), name)
    everywhere = _parameters(table.get("parameters"), name)
    dtypes = [table.get(k) for k in ("out_dtype", "dtype")]
    for value in dtypes:
        if value is not None and not isinstance(value, str):
            raise MergeidError(f"{name}: dtype is {value!r}; expected float32, float16, bfloat16 or float64")
    try:
        return _assembled(method, models, own, base, everywhere, next((d for d in dtypes if d), None))
    except MergeidError as error:
        raise MergeidError(f"{name}: {error}") from None


def _assembled(
    method: MergeMethod,
    models: list[str],
    own: list[dict[str, Any]],
    base: str | None,
    everywhere: dict[str, Any],
    dtype: str | None,
) -> Recipe:
    if method.name == "slerp":
        return _slerp(models, own, base, everywhere, dtype)
    if base is not None and base in models and method.base:
        at = models.index(base)
        models, own = models[:at] + models[at + 1 :], own[:at] + own[at + 1 :]
    elif base is not None and base in models:
        base = None  # mergekit takes the tokenizer from it, and merges it like the others
    for given in (everywhere, *own):
        if given.pop("int8_mask", None):
            warnings.warn("int8_mask only saves memory in mergekit and is ignored", MergeidWarning, stacklevel=4)
    weights = _per_model("weight", own, everywhere)
    if weights is not None and method.weights == "ignored":
        raise MergeidError(f"method {method.name!r} uses no weights; leave out 'weight'")
    parameters: dict[str, Any] = dict(_DEFAULTS.get(method.name, {}))
    normalize = method.weights == "shares"
    if normalize and "normalize" in everywhere:
        normalize = _switch(everywhere.pop("normalize"))
    named = {key for given in (everywhere, *own) for key in given} - {"weight"}
    for key in sorted(named):
        parameter = method.parameter(key)
        if parameter.per_model:
            parameters[key] = _per_model(key, own, everywhere, default=parameter.default)
        elif any(key in given for given in own):
            raise MergeidError(f"parameter {key!r} is one for all models; write it under the recipe's own parameters")
        else:
            parameters[key] = everywhere[key]
    return Recipe(models, method.name, base, weights, parameters, normalize, dtype)


def _slerp(
    models: list[str], own: list[dict[str, Any]], base: str | None, everywhere: dict[str, Any], dtype: str | None
) -> Recipe:
    """`t` goes from the base (0) to the other model (1)."""
    if base is not None and base not in models:
        models, own = [base, *models], [{}, *own]
    if base is None or len(models) != 2:
        raise MergeidError(f"slerp takes a base_model and one other, got {len(models)} models; see also karcher")
    other = 1 - models.index(base)
    given = {**everywhere, **own[1 - other], **own[other]}
    for key in sorted(set(given) - {"t"}):
        raise MergeidError(f"method 'slerp' has no parameter {key!r} in a recipe; expected t")
    if "t" not in given:
        raise MergeidError("slerp needs a parameter t, from 0 (the base) to 1 (the other model)")
    t = given["t"]
    return Recipe([base, models[other]], "slerp", None, [_complement(t), t], {}, False, dtype)


def _complement(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return tuple(_complement(s) for s in setting)
    if isinstance(setting, Condition):
        return Condition(_complement(setting.value), setting.pattern, setting.required)
    return 1 - setting


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MergeidError(f"parameter 'normalize' is {value!r}; expected true or false")
    return value


def _per_model(key: str, own: Sequence[dict[str, Any]], everywhere: dict[str, Any], default: Any = None) -> Any:
    """One setting per model: its own, else (and where no condition of it matches) the recipe's. None: not given."""
    if key not in everywhere and not any(key in given for given in own):
        return None
    found = []
    for given in own:
        levels = [level[key] for level in (given, everywhere) if key in level]
        if default is not None:
            levels.append(default)
        if not levels:
            raise MergeidError(f"parameter {key!r} is given for some of the models only; expected it for each")
        found.append(_joined(levels))
    return found


def _joined(levels: Sequence[Any]) -> Any:
    """Settings of falling precedence as one."""
    conditions: list[Condition] = []
    for level in levels:
        if not (isinstance(level, tuple) and level and isinstance(level[0], Condition)):
            if not conditions:
                return level
            return (*conditions, Condition(level, "*", False))
        conditions += level
    return tuple(conditions)


def _table(value: Any, name: str, keys: Sequence[str]) -> dict[str, Any]:
    """A mapping with these keys and no others."""
    if not isinstance(value, Mapping):
        raise MergeidError(f"{name} is {_kind(value)}; expected a table with {', '.join(keys)}")
    for key in value:
        if key in _REFUSED and key not in keys:
            raise MergeidError(f"{name} has the key {key!r}, which is not supported: {_REFUSED[key]}")
        if key not in keys:
            near = near_names(str(key), keys, n=3)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            raise MergeidError(f"{name} has an unknown key {key!r}{hint}; expected {', '.join(keys)}")
    return dict(value)


def _kind(value: Any) -> str:
    kinds = {type(None): "empty", list: "a list", str: "text", dict: "a table"}
    return kinds.get(type(value), repr(value))


def _models(value: Any, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        raise MergeidError(f"{name} lists no models; expected models: [{{model: A}}, {{model: B}}]")
    models, parameters = [], []
    for i, entry in enumerate(value, 1):
        place = f"{name}, model {i}"
        table = _table(entry, place, ("model", "parameters"))
        model = table.get("model")
        if not isinstance(model, str):
            raise MergeidError(f"{place} has no path or hub id under 'model'")
        if "+" in model and not os.path.exists(model):
            raise MergeidError(f"{place}: {model} asks for a LoRA on top of a model; merge it into the model first")
        models.append(model)
        parameters.append(_parameters(table.get("parameters"), place))
    return models, parameters


def _parameters(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MergeidError(f"{place}: parameters are {_kind(value)}; expected a table of names and values")
    return {str(k): _setting(v, f"{place}, parameter {str(k)!r}") for k, v in value.items()}


def _setting(value: Any, place: str) -> Any:
    """A scalar, a tuple of numbers (gradient), or a tuple of `Condition`."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return _scalar(value, place)
    if not value:
        raise MergeidError(f"{place} is an empty list; expected numbers, or conditions with filter and value")
    if not any(isinstance(v, Mapping) for v in value):
        return tuple(_scalar(v, place) for v in value)
    conditions = []
    for entry in value:
        table = _table(entry, place, ("filter", "value"))
        wanted = table.get("filter")
        if "value" not in table or not (wanted is None or isinstance(wanted, str)):
            raise MergeidError(f"{place} has a condition without a value, or a filter that is no text")
        found = _setting(table["value"], place)
        if isinstance(found, tuple) and isinstance(found[0], Condition):
            raise MergeidError(f"{place} has conditions inside a condition; expected numbers there")
        everywhere = wanted is None or wanted == "*"
        conditions.append(Condition(found, "*" if everywhere else f"*{_literally(str(wanted))}*", False))
    return tuple(conditions)


def _literally(text: str) -> str:
    """A glob that matches this text and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _scalar(value: Any, place: str) -> bool | int | float:
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    if not isinstance(value, (bool, int, float)):
        raise MergeidError(f"{place} is {value!r}; expected a number, true or false, a list of numbers, or conditions")
    return value
