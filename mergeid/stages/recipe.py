"""From a recipe to open models and settings: slices become stacks of layers, modules become models of several models'
parts, and what is said of each becomes a value per tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mergeid.basics.stopping import TemporaryFolder
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived
from mergeid.io.opening import open_checkpoint
from mergeid.methods.recipe import Ranged, Recipe
from mergeid.methods.registry import get_method
from mergeid.methods.settings import ByName, Scalar, Setting, depths, evaluate
from mergeid.models.chat_templates import commonest
from mergeid.models.modules import modules_of, patched
from mergeid.models.slices import Slice, behind, layers_of, stacked
from mergeid.models.vocabularies import one_vocabulary

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """A recipe whose models are found.

    Attributes:
        models: names of models, or stacks of slices.
        recipe: the settings, with one value per tensor where there are slices.
        base: likewise the base.
    """

    models: list[str | Checkpoint]
    recipe: Recipe
    base: str | Checkpoint | None


def merge_stages(
    stages: Sequence[Recipe],
    output: str | os.PathLike[str] | None,
    merge: Callable[[Prepared, str | os.PathLike[str] | None], Result],
    opened: Callable[[str], Checkpoint] = open_checkpoint,
) -> Result:
    """Merge stage after stage (`mergeid.methods.recipe.read_stages`). What later ones need lies in a hidden folder
    beside the output until all are done.

    Args:
        output: of the last stage.
        merge: (a stage, output) -> its result.
        opened: opens the models of slices.

    Returns:
        The last stage's result.

    Raises:
        MergeidError: as `prepared`, and as `merge` does; what lay in between is gone.
    """
    last = stages[-1]
    if not stages[:-1]:
        return merge(prepared(last, {}, opened), output)
    beside = Path(output).expanduser().parent if output is not None else Path()
    with TemporaryFolder(beside) as folder:
        places: dict[str, str] = {}
        for i, stage in enumerate(stages[:-1]):
            place = Path(folder) / str(i)
            merge(prepared(stage, places, opened), place)
            places[str(stage.name)] = str(place)
        return merge(prepared(last, places, opened), output)


def prepared(
    recipe: Recipe, places: Mapping[str, str], opened: Callable[[str], Checkpoint] = open_checkpoint
) -> Prepared:
    """Names of models as they are, those of earlier stages by their place, and stacks of slices.

    Args:
        places: name of an earlier stage -> the folder where its result lies.
        opened: opens the models of slices.

    Raises:
        MergeidError: slices of layers that a model does not have, or of models that do not go together.
    """

    def found(name: str) -> str:
        return places.get(str(name), str(name))

    if not recipe.slices:
        base = None if recipe.base is None else found(recipe.base)
        return Prepared([found(m) for m in recipe.models], recipe, base)
    names = list(dict.fromkeys(found(name) for name in recipe.sources()))
    sources = [opened(name) for name in names]
    template = commonest(sources) if recipe.chat_template == "auto" else recipe.chat_template
    same = one_vocabulary(sources, recipe.tokenizer, False)
    for note in same.notes:
        warnings.warn(note, MergeidWarning, stacklevel=2)
    open_models = dict(zip(names, same.models, strict=True))
    parts = recipe.slices
    bases = [part.base for part in parts if part.base is not None]
    which = [[part.models[i] for part in parts] for i in range(len(parts[0].models))] + ([bases] if bases else [])
    if parts[0].module is not None:
        modules = [str(part.module) for part in parts]
        part_of = modules_of(open_models[found(which[0][0])], modules)
        stacks = [
            patched(part_of, {m: open_models[found(n)] for m, n in zip(modules, of, strict=True)}) for of in which
        ]
        depth = depths(part_of)
        where = {name: (modules.index(part), depth[name]) for name, part in part_of.items()}
    else:

        def slice_of(name: str) -> Slice:
            if not isinstance(name, Ranged):
                raise MergeidError(f"{name} is the base of slices but not one of their sources; add it to the sources")
            return Slice(open_models[found(name)], name.first, name.end)

        made = [stacked([slice_of(name) for name in of]) for of in which]
        where = _places(made[0], parts)
        stacks = [*made]
    origin = stacks.pop() if bases else None
    told = partial(_by_name, where)
    count = len(stacks)
    weights: list[Setting] | None = None
    if parts[0].weights is not None:
        weights = [told([_weights(part)[i] for part in parts]) for i in range(count)]
    parameters: dict[str, Any] = {}
    for key in sorted({key for part in parts for key in part.parameters}):
        parameter = get_method(recipe.method).parameter(key)
        given: list[Any] = [part.parameters.get(key, parameter.default) for part in parts]
        if parameter.per_model:
            several = [one if isinstance(one, list) else [one] * count for one in given]
            parameters[key] = [told([one[i] for one in several]) for i in range(count)]
        else:
            parameters[key] = told(given)
    settled = replace(recipe, weights=weights, parameters=parameters, tokenizer=None, chat_template=template)
    return Prepared(list(stacks), settled, origin)


def _length(part: Recipe) -> int:
    first = part.models[0]
    assert isinstance(first, Ranged)
    return first.end - first.first


def _weights(part: Recipe) -> list[Setting]:
    if part.weights is None:
        raise MergeidError("'weight' is given for only some of the slices; expected it for each")
    return part.weights


def _places(stack: Derived, parts: Sequence[Recipe]) -> dict[str, tuple[int, float]]:
    """Tensor -> the slice that it belongs to, and its depth there: gradients go over the layers of a slice."""
    layers, bottom = layers_of(stack), stack.parents[0]
    slice_of: list[tuple[int, float]] = []
    for i, length in enumerate(map(_length, parts)):
        slice_of += [(i, at / (length - 1) if length > 1 else 1.0) for at in range(length)]
    told = [(part.weights, part.parameters) for part in parts]
    later = behind(bottom, layers_of(bottom)) if any(one != told[0] for one in told) else set()
    places: dict[str, tuple[int, float]] = {}
    for name in stack.table:
        split = layers.split(name)
        if split is not None:
            places[name] = slice_of[split[0]]
        else:
            below = name not in later and any(checkpoint is bottom for checkpoint, _ in stack.formed[name].reads)
            places[name] = (0 if below else len(parts) - 1, 0.0)
    return places


def _by_name(places: Mapping[str, tuple[int, float]], settings: Sequence[Setting]) -> ByName:
    """What is said of each part, tensor by tensor."""
    values: dict[str, Scalar] = {}
    for name, (part, depth) in places.items():
        value = evaluate(settings[part], name, depth)
        if value is not None:
            values[name] = value
    return ByName(values)
