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
model's parameters come before those of the recipe. Where defaults differ, a recipe has mergekit's. Two things differ in
the result: sums are taken in float32 or float64 whatever `dtype` says, and the output follows the first model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergeid.basics.reading import read_yaml_documents
from mergeid.errors import MergeidError, MergeidWarning, listed
from mergeid.io.dtypes import parse_dtype
from mergeid.io.recipe_schema import ModuleEntry, RecipeFile, SliceEntry
from mergeid.io.schema import validated
from mergeid.methods.recipe_settings import Table, complement, joined, settings_of, shared, words_in
from mergeid.methods.recipe_tokens import vocabulary_of
from mergeid.methods.registry import MergeMethod, Parameter, get_method
from mergeid.methods.settings import Parameters, Setting
from mergeid.request.vocabulary import Vocabulary

_DEFAULTS: dict[str, Table] = {
    "dare_linear": {"rescale_norm": "l1"},
    "dare_ties": {"normalize": False, "rescale_norm": "l1"},
    "della": {"rescale_norm": "l1"},
    "della_linear": {"rescale_norm": "l1"},
    "karcher": {"max_iter": 10, "tol": 1e-5},
}
"""mergekit's, where they are not ours."""
_WHOLE = "default"
"""mergekit's name for the module that a model consists of, where it has no others."""
_WITHOUT_EFFECT = {"task_arithmetic": ("density", "rescale", "rescale_norm")}
"""Parameters that mergekit takes for a method and does nothing with, besides int8_mask."""


class Ranged(str):
    """The name of a model of which a slice of layers is taken.

    Attributes:
        first, end: its layers, `end` not included.
    """

    first: int
    end: int

    @classmethod
    def of(cls, name: str, first: int, end: int) -> Ranged:
        """That model, and which of its layers."""
        found = cls(name)
        found.first, found.end = first, end
        return found


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, as arguments of `mergeid.merge`.

    Attributes:
        models: what to merge, the base not among them.
        method: name in the registry.
        base: the base model, for methods that need one.
        weights: one setting per model; None: equal shares.
        parameters: of the method.
        normalize: True: scale the weights to sum 1; False: take them as they are; None: as the method does.
        dtype: of the output.
        slices: for recipes with slices or several modules, what each is merged of and how, bottom first; `models` is
            empty then.
        module: the part of the models that this is about; None: it is about all of them, or about a slice.
        name: under which later documents of the same file name the result.
        tokenizer: whose tokens the result has, with slices among the models as they are first named; None: all have the
            same.
        chat_template: as `mergeid.merge` takes it.
    """

    models: list[str]
    method: str
    base: str | None = None
    weights: list[Setting] | None = None
    parameters: Parameters = field(default_factory=dict)
    normalize: bool | None = None
    dtype: str | None = None
    slices: tuple[Recipe, ...] = ()
    module: str | None = None
    name: str | None = None
    tokenizer: Vocabulary | None = None
    chat_template: str | None = None

    def sources(self) -> list[str]:
        """All models that it names."""
        own = [*self.models, *([self.base] if self.base is not None else [])]
        return [str(name) for name in own] + [name for part in self.slices for name in part.sources()]


def read_stages(path: str | os.PathLike[str]) -> list[Recipe]:
    """Read all documents of a recipe, in an order in which each comes after those that it names; the last is what the
    file is about.

    Raises:
        MergeidError: no such file, no YAML, unknown or refused keys, values of another kind than expected; a name
            twice, several documents without one, or stages that need each other.
    """
    name = os.fspath(path)
    documents = read_yaml_documents(path, "a recipe in YAML")
    recipes = []
    for i, parsed in enumerate(documents):
        recipes.append(parse_recipe(parsed, name if len(documents) == 1 else f"{name}, document {i + 1}"))
    return in_order(recipes, name)


def in_order(recipes: Sequence[Recipe], name: str = "the recipe") -> list[Recipe]:
    """Stages so that each comes after those that it names. Raises `MergeidError` where that cannot be."""
    named = {r.name: r for r in recipes if r.name is not None}
    unnamed = [r for r in recipes if r.name is None]
    if len(named) + len(unnamed) < len(recipes):
        twice = next(r.name for i, r in enumerate(recipes) if r.name in [q.name for q in recipes[:i]])
        raise MergeidError(f"{name}: two documents have the name {twice!r}; expected each once")
    if len(unnamed) > 1:
        raise MergeidError(
            f"{name}: {len(unnamed)} documents have no name; expected only one without, whose result is the output"
        )
    last = unnamed[0] if unnamed else recipes[-1]
    done: list[Recipe] = []

    def visit(recipe: Recipe, above: tuple[str | None, ...]) -> None:
        if recipe in done:
            return
        if recipe.name is not None and recipe.name in above:
            chain = listed(above) if len(above) > 8 else " → ".join(map(str, above))
            raise MergeidError(f"{name}: {recipe.name!r} depends on itself ({chain}); expected merges of other models")
        for source in recipe.sources():
            if source in named:
                visit(named[source], (*above, recipe.name))
        done.append(recipe)

    visit(last, ())
    for recipe in recipes:
        if recipe not in done:
            told = f"{recipe.name!r} is used by no other document, so it is left out"
            warnings.warn(f"{name}: {told}", MergeidWarning, stacklevel=3)
    return done


def parse_recipe(parsed: Any, name: str = "the recipe") -> Recipe:
    """A recipe from parsed YAML; `name` is what messages call it. Raises `MergeidError` as `read_stages` does."""
    told = validated(RecipeFile, parsed, name)
    entries, slices = told.models, told.slices
    modules = told.modules or {}
    only = modules.get(_WHOLE) if len(modules) == 1 else None
    if only is not None:
        entries, slices = only.models, only.slices
    if (only is not None or not modules) and (entries is None) == (slices is None):
        raise MergeidError(f"{name} lacks the key 'models'; expected either models or slices")
    try:
        method = get_method(told.merge_method)
        everywhere = settings_of(told.parameters)
        if only is not None:
            everywhere = shared([settings_of(only.parameters), everywhere])
        dtype = told.out_dtype or told.dtype
        for key, value in (("dtype", told.dtype), ("out_dtype", told.out_dtype)):
            if value is not None:
                parse_dtype(value, key)
        if modules and only is None:
            found = _of_modules(method, modules, told, everywhere, dtype)
        elif slices is not None:
            found = _sliced(method, slices, told.base_model, everywhere, dtype, told.name)
        else:
            models = [entry.model for entry in entries or ()]
            own = [settings_of(entry.parameters) for entry in entries or ()]
            found = replace(_assembled(method, models, own, told.base_model, everywhere, dtype), name=told.name)
        names = found.sources() if found.slices else found.models
        words = vocabulary_of(told, list(dict.fromkeys(map(str, names))), found.base)
        return replace(found, tokenizer=words, chat_template=told.chat_template)
    except MergeidError as error:
        raise MergeidError(f"{name}: {error}") from None


def _sliced(
    method: MergeMethod,
    slices: Sequence[SliceEntry],
    base: str | None,
    everywhere: Table,
    dtype: str | None,
    name: str | None,
) -> Recipe:
    """Every slice as a recipe of its own; they must merge the same number of models."""
    parts = []
    for i, one in enumerate(slices):
        models: list[str] = []
        for source in one.sources:
            first, end = source.layer_range
            models.append(Ranged.of(source.model, first, end))
        if len({m.end - m.first for m in models if isinstance(m, Ranged)}) > 1:
            raise MergeidError(
                f"slices[{i}] takes different numbers of layers from its sources; expected the same from each"
            )
        if one.residual_weight is not None:
            warnings.warn("residual_weight has no effect, nor has it in mergekit", MergeidWarning, stacklevel=4)
        own = [settings_of(source.parameters) for source in one.sources]
        said = shared([settings_of(one.parameters), everywhere])
        origin = None if method.name == "passthrough" else one.base_model or base
        if method.most is not None and len(models) > method.most + (method.base is True):
            raise MergeidError(f"slices[{i}] has {len(models)} sources; method {method.name!r} takes {method.most}")
        parts.append(_assembled(method, models, own, origin, said, dtype))
    return _whole(parts, "slices", name)


def _of_modules(
    method: MergeMethod, modules: Mapping[str, ModuleEntry], told: RecipeFile, everywhere: Table, dtype: str | None
) -> Recipe:
    """Every module as a recipe of its own; they must merge the same number of models."""
    parts = []
    for name, module in modules.items():
        if module.models is None:
            raise MergeidError(
                f"modules.{name} has no models; expected whole models where there are several modules, and slices only "
                "in a model's only module"
            )
        own = [settings_of(entry.parameters) for entry in module.models]
        said = shared([settings_of(module.parameters), everywhere])
        part = _assembled(method, [e.model for e in module.models], own, told.base_model, said, dtype)
        parts.append(replace(part, module=name))
    return _whole(parts, "modules", told.name)


def _whole(parts: Sequence[Recipe], what: str, name: str | None) -> Recipe:
    if len({len(part.models) for part in parts}) > 1:
        counts = ", ".join(str(len(part.models)) for part in parts)
        raise MergeidError(f"the {what} merge {counts} models; expected the same number in each")
    return replace(parts[0], models=[], base=None, module=None, slices=tuple(parts), name=name)


def _assembled(
    method: MergeMethod,
    models: list[str],
    own: list[Table],
    base: str | None,
    everywhere: Table,
    dtype: str | None,
) -> Recipe:
    if method.name == "slerp":
        return _slerp(models, own, base, everywhere, dtype)
    if method.ordered:
        models, own = _from_base(method.name, models, own, base)
        base = None
    if base is not None and base in models and method.base:
        at = models.index(base)
        base = models[at]
        models, own = models[:at] + models[at + 1 :], own[:at] + own[at + 1 :]
    elif base is not None and base in models:
        base = None  # mergekit takes the tokenizer from it, and merges it like the others
    if method.base is True and base is None:
        raise MergeidError(
            f"method {method.name!r} needs the model that the others were fine-tuned from; add base_model"
        )
    if base is not None and not method.base:
        raise MergeidError(f"method {method.name!r} uses no base model; leave out base_model, or add it to the models")
    for given in (everywhere, *own):
        if given.pop("int8_mask", None):
            warnings.warn("int8_mask only saves memory in mergekit and is ignored", MergeidWarning, stacklevel=4)
        for key in _WITHOUT_EFFECT.get(method.name, ()):
            if given.pop(key, None) is not None:
                text = f"{key} has no effect on {method.name} (nor in mergekit) and is ignored"
                warnings.warn(text, MergeidWarning, stacklevel=4)
    return replace(_told(method, own, everywhere), models=models, base=base, dtype=dtype)


def _told(method: MergeMethod, own: list[Table], everywhere: Table) -> Recipe:
    """The weights and parameters of a recipe, whose models are said elsewhere."""
    weights = _per_model("weight", own, everywhere)
    if words := words_in(weights):
        raise MergeidError(f"parameter 'weight' is {words[0]!r}; expected a number")
    if weights is not None and method.weights == "ignored":
        raise MergeidError(f"method {method.name!r} uses no weights; leave out 'weight'")
    parameters: Table = dict(_DEFAULTS.get(method.name, {}))
    normalize = True if method.weights == "shares" else None
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
        _check_words(parameter, parameters[key])
    return Recipe([], method.name, None, weights, parameters, normalize)


def _slerp(models: list[str], own: list[Table], base: str | None, everywhere: Table, dtype: str | None) -> Recipe:
    """`t` goes from the base (0) to the other model (1)."""
    models, own = _from_base("slerp", models, own, base)
    given = {**everywhere, **own[0], **own[1]}
    for key in sorted(set(given) - {"t"}):
        raise MergeidError(f"method 'slerp' has no parameter {key!r} in a recipe; expected t")
    if "t" not in given:
        raise MergeidError("slerp needs a parameter t, from 0 (the base) to 1 (the other model)")
    t = given["t"]
    if words := words_in(t):
        raise MergeidError(f"parameter 't' is {words[0]!r}; expected a number")
    return Recipe(models, "slerp", None, [complement(t), t], dtype=dtype)


def _from_base(name: str, models: list[str], own: list[Table], base: str | None) -> tuple[list[str], list[Table]]:
    """Both models and their parameters, the base first."""
    if base is not None and base not in models:
        models, own = [base, *models], [{}, *own]
    if base is None or len(models) != 2:
        hint = "; see also karcher" if name == "slerp" else ""
        raise MergeidError(f"{name} takes a base_model and one other, got {len(models)} models{hint}")
    first = models.index(base)
    return [models[first], models[1 - first]], [own[first], own[1 - first]]


def _check_words(parameter: Parameter, setting: Any) -> None:
    for word in words_in(setting):
        parameter.checked(word)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MergeidError(f"parameter 'normalize' is {value!r}; expected true or false")
    return value


def _per_model(key: str, own: Sequence[Table], everywhere: Table, default: Any = None) -> Any:
    """One setting per model: its own, else (and where no condition of it matches) the recipe's. None: not given."""
    if key not in everywhere and not any(key in given for given in own):
        return None
    found = []
    for given in own:
        levels = [level[key] for level in (given, everywhere) if key in level]
        if default is not None:
            levels.append(default)
        if not levels:
            raise MergeidError(f"parameter {key!r} is given for only some of the models; expected it for each")
        found.append(joined(levels))
    return found
