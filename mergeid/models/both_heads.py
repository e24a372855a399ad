"""Classifiers with different classes: one head with the classes of all, one model's after the other's.

Every model's head gets rows of zeros where the others' classes stand, so that all have one shape, and the heads of a
merge are *added up*: rows of zeros change nothing of another model's, and share no direction with them when neurons are
compared. Which columns of its output a model answers for is said by `JoinedHead`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import count
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, shown
from mergeid.io.building import Room, build
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import label_map
from mergeid.io.derived import Formed, derived, read_from, same_numbers
from mergeid.io.dtypes import torch_dtype
from mergeid.io.tensors import TensorSource
from mergeid.models.architecture import find_architecture
from mergeid.nn.names import is_asymmetric
from mergeid.plugins import Adapter, Architecture, KnowsHeads, SetsClasses, TensorInfo
from mergeid.request.request import Reading

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JoinedHead:
    """A head with the classes of several models.

    Attributes:
        tensors: their names in the files; rows are classes.
        classes: how many each model has, in their order.
    """

    tensors: tuple[str, ...]
    classes: tuple[int, ...]


@dataclass
class BothHeads:
    """Models with one head for all classes.

    Attributes:
        models: in the order given.
        joined: None: nothing was asked for.
        notes: what the user should know.
    """

    models: list[Checkpoint]
    joined: JoinedHead | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any] | None:
        """For the record; None where nothing was asked for."""
        if self.joined is None:
            return None
        return {"tensors": list(self.joined.tensors), "classes": list(self.joined.classes)}


def both_heads(models: Sequence[Checkpoint], reading: Reading, has_base: bool) -> BothHeads:
    """Give all classifiers a head for the classes of all.

    Args:
        models: all that meet, the base last, under the same names. The base's own classes count for nothing.
        has_base: whether the last model is the base.

    Raises:
        MergeidError: live modules, models that are no classifiers, heads that are no single linear layer, or models
            with the same classes.
    """
    found = BothHeads(list(models))
    if reading.heads is None:
        return found
    if any(not m.files for m in models):
        raise MergeidError("--heads both works on files; save the live modules first")
    if reading.arch is not None and reading.arch.endswith(".json"):
        raise MergeidError(
            f"--heads both reads the classes of each model from its own files; leave out --arch {reading.arch}, and "
            "put each model's config.json beside its weights"
        )
    own = list(models[:-1] if has_base else models)
    if len(own) < 2:
        raise MergeidError(f"--heads both joins the heads of two or more models, got {len(own)}; leave it out")
    known = [find_architecture(model, reading.arch) for model in own]
    heads = [_head(model, *kind) for model, kind in zip(own, known, strict=True)]
    names = tuple(heads[0])
    for model, head in zip(own, heads, strict=True):
        if tuple(head) != names:
            raise MergeidError(
                f"the head is {', '.join(names)} in {own[0].source} and {', '.join(head)} in {model.source}; expected "
                "two classifiers of one architecture"
            )
    skipped = next((p for p in reading.skip if any(fnmatchcase(n, p) for n in names)), None)
    if skipped is not None:
        raise MergeidError(f"--skip {skipped!r} takes A's head, and --heads both keeps all heads; leave out one")
    classes = tuple(next(iter(head.values())) for head in heads)
    labels = _labels(own, classes, found.notes)
    adapter: Any = known[0][0]
    for at, model in enumerate(models):
        config = model.config
        if config is not None:
            config = adapter.config_with_classes(config, sum(classes), labels)
        formed = {name: read_from(model, name) for name in model.table}
        for name in names:
            if name in model.table:
                formed[name] = _widened(model, name, classes, at if at < len(classes) else None)
        found.models[at] = derived(model.source, model, formed, parents=[model], config=config)
    found.joined = JoinedHead(names, classes)
    said = ", then ".join(f"{n} of {m.source}" for n, m in zip(classes, own, strict=True))
    found.notes.insert(0, f"the result's head has {sum(classes)} classes: {said}")
    return found


def _head(model: Checkpoint, adapter: Adapter, arch: Architecture) -> dict[str, int]:
    """Name in the file -> number of classes, for the tensors of a classifier's head."""
    from torch import nn

    none = (
        f"--heads both joins the classes of classifiers, and {model.source} ({arch.id}) is not one; expected a model "
        "with one score for each of two or more classes"
    )
    if not isinstance(adapter, SetsClasses) or not isinstance(adapter, KnowsHeads):
        raise MergeidError(none)
    if is_asymmetric(model.table):
        raise MergeidError(f"{model.source} has asymmetric layers; fold it first (mergeid.nn.fold_file)")
    room = Room.of(model.table)
    network = build(adapter, arch, room, device="meta")
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    taken = {shape[0] for shape in shapes.values() if shape}
    other = build(adapter, adapter.with_classes(arch, next(n for n in count(2) if n not in taken)), room, device="meta")
    changed = [key for key, value in other.state_dict().items() if shapes.get(key) != tuple(value.shape)]
    if adapter.logits(network) is None or not changed:
        raise MergeidError(none)
    places = dict.fromkeys(key.rpartition(".")[0] for key in changed)
    place, *more = places
    if more or any(key not in shapes for key in changed) or not isinstance(network.get_submodule(place), nn.Linear):
        raise MergeidError(
            f"--heads both joins heads of one linear layer, and the classes of {model.source} are in "
            f"{' and '.join(map(shown, places))}; expected a single linear layer, or merge with --skip or mergeid zip"
        )
    name_of = {key: name for name, key in adapter.tensor_names(arch, network, model.table).items()}
    found = {name_of[key]: shapes[key][0] for key in changed if key in name_of}
    for name, classes in found.items():
        if model.table[name].shape[0] != classes:
            raise MergeidError(
                f"tensor {name!r} of {model.source} has {model.table[name].shape[0]} rows, and its config says "
                f"{classes} classes; correct the config.json"
            )
    if len(found) < len(changed):
        raise MergeidError(f"{model.source} lacks the tensors of its head ({', '.join(changed)})")
    return found


def _widened(model: TensorSource, name: str, classes: Sequence[int], at: int | None) -> Formed:
    """A tensor of a head with rows of zeros for the classes of the others; at: None: for all classes."""
    info = model.table[name]
    shape = (sum(classes), *info.shape[1:])

    def form() -> Tensor:
        import torch

        found = torch.zeros(shape, dtype=torch_dtype(info.dtype))
        if at is not None:
            found[sum(classes[:at]) : sum(classes[: at + 1])] = model.tensor(name)
        return found

    return Formed(TensorInfo(info.dtype, shape), form, ((model, name),), f"widened {classes} {at}")


def _labels(models: Sequence[Checkpoint], classes: Sequence[int], notes: list[str]) -> list[str] | None:
    """The names of all classes, those that several models have told apart; None where nobody has named any.

    Raises `MergeidError` where two models name the same classes."""
    named = [_named(model, n) for model, n in zip(models, classes, strict=True)]
    for at, labels in enumerate(named):
        for other in range(at):
            if labels == named[other] is not None or same_numbers(models[at], models[other]):
                raise MergeidError(
                    f"{models[other].source} and {models[at].source} have the same {classes[at]} classes, so their "
                    "heads can be merged like everything else; leave out --heads"
                )
    if not any(named):
        return None
    starts = [sum(classes[:at]) for at in range(len(classes))]
    generic = [[f"LABEL_{start + i}" for i in range(n)] for start, n in zip(starts, classes, strict=True)]
    whole = [own or placeholders for own, placeholders in zip(named, generic, strict=True)]
    uses = Counter(label for labels in whole for label in labels)
    found: list[str] = []
    for at, labels in enumerate(whole):
        for label in labels:
            own = label if uses[label] == 1 else f"{label} ({chr(ord('a') + at)})"
            while own != label and own in uses:
                own += "'"
            uses[own] += own != label
            found.append(own)
    twice = [label for label, n in Counter(label for labels in whole for label in set(labels)).items() if n > 1]
    if twice:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        notes.append(f"several models have a class {shown(twice[0])}{more}; the model's letter is added to each name")
    return found


def _named(model: TensorSource, classes: int) -> list[str] | None:
    """What the config calls the classes; None where it gives placeholders or no name for each."""
    labels = label_map(model.config)
    if labels is None or set(labels) != {str(i) for i in range(classes)}:
        return None
    found = [labels[str(i)] for i in range(classes)]
    return None if found == [f"LABEL_{i}" for i in range(classes)] else found
