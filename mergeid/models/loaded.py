"""A model that runs, what it takes and what it returns."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.nested import as_batch
from mergeid.errors import MergeidError
from mergeid.plugins import Adapter, Architecture, Batch, KnowsHeads, KnowsModules, LossParts, ReturnsSeveral

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.io.checkpoint import Checkpoint
    from mergeid.models.both_heads import JoinedHead

POSITION = re.compile(r"arg(\d{1,9})")


@dataclass
class Loaded:
    """A runnable model and where it came from.

    Attributes:
        source: what the user named.
        model: in eval mode.
        adapter, arch: who built it; for a live module of no known library, a stand-in that calls it as it is.
        checkpoint: its weights on disk; None for a live module or a bare architecture.
        names: checkpoint tensor name -> key of the model's state dict.
        example: the batch that traces the model.
        wanted: names (or globs) of the outputs that count; none: all of them.
        unread: names of outputs that count as an interface, but that nobody reads: merges are not judged by them.
        joined: its head, where that has the classes of several models.
    """

    source: str
    model: nn.Module
    adapter: Adapter
    arch: Architecture
    checkpoint: Checkpoint | None
    names: dict[str, str]
    example: Batch
    wanted: tuple[str, ...] = ()
    joined: JoinedHead | None = None
    unread: frozenset[str] = frozenset()

    def apart_from(self, other: Loaded) -> Loaded:
        """Itself, with a network of its own where both share one: a model that meets itself."""
        return replace(self, model=copy.deepcopy(self.model)) if self.model is other.model else self

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task output of one forward pass."""
        if self.wanted:
            return next(iter(self.outputs(model, batch).values()))
        return self.adapter.forward(model, batch)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Every floating-point (or complex) tensor that a caller of the model reads, by name, the task output first.

        Raises `MergeidError` where there is none, or none of the `wanted`."""
        if isinstance(self.adapter, ReturnsSeveral):
            found = dict(self.adapter.outputs(model, batch))
        else:
            found = {"output": self.adapter.forward(model, batch)}
        return _chosen(found, self.wanted) if self.wanted else found

    def whole_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`outputs`, and of a live module also what it returns in whole numbers and flags: actions, codes, masks.

        Raises as `outputs` does."""
        if not isinstance(self.adapter, ModuleAdapter):
            return self.outputs(model, batch)
        found = self.adapter.whole_outputs(model, batch)
        return _chosen(found, self.wanted) if self.wanted else found

    def loss(self, output: Tensor, batch: Batch) -> LossParts | None:
        """The task's loss of an output; None: the model has no task, or the batch no targets."""
        return self.adapter.loss(self.arch, output, batch)

    @property
    def inputs(self) -> Batch:
        """The example without its labels."""
        return self.inputs_of(self.example)

    def inputs_of(self, batch: Batch) -> Batch:
        """A batch without its targets: what the model itself takes."""
        takes = isinstance(self.adapter, ModuleAdapter) and self.adapter.takes_labels
        return dict(batch) if takes else {k: v for k, v in batch.items() if k != "labels"}

    @property
    def called(self) -> dict[str, str]:
        """State-dict key -> the name that settings and --skip go by: that of the tensor in the files, or of the first
        one that it is made of."""
        return {key: names[0] for key, names in self.made_of.items()}

    @property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """State-dict key -> the tensors in the files that it is made of."""
        from mergeid.models.converted import Converted

        found: dict[str, tuple[str, ...]] = {key: (name,) for name, key in self.names.items()}
        if isinstance(self.checkpoint, Converted):
            found |= {key: c.names for c in self.checkpoint.conversions for key in c.keys}
        return found

    def places(self, name: str, axis: int) -> list[tuple[str, int]]:
        """Where in the network an axis of a tensor in the files is: (state-dict key, axis), or all axes of what it
        becomes a part of."""
        from mergeid.models.converted import Converted

        if isinstance(self.checkpoint, Converted):
            made = [key for c in self.checkpoint.conversions if name in c.names for key in c.keys]
            if made:
                return [(key, d) for key in made for d in range(len(self.checkpoint.table[key].shape))]
        return [(self.names.get(name, name), axis)]

    @property
    def head(self) -> dict[str, tuple[int, ...]]:
        """Key of a joined head's tensor -> how many of its rows are each model's."""
        found = self.joined
        return {} if found is None else {self.names[n]: found.classes for n in found.tensors}

    def state(self) -> dict[str, Tensor]:
        """The weights under the model's keys."""
        from mergeid.basics.state import tensors_of

        return tensors_of(self.model)

    @property
    def folder(self) -> Path | None:
        """Where tokenizer and preprocessor files lie."""
        if self.checkpoint is None:
            return None
        return self.checkpoint.path if self.checkpoint.is_folder else self.checkpoint.path.parent


def _chosen(found: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """The wanted outputs, in the order in which they are wanted: a name takes all that lies under it."""
    out: dict[str, Tensor] = {}
    for name in wanted:
        hits = {k: t for k, t in found.items() if fnmatchcase(k, name) or k.startswith(f"{name}.")}
        if not hits and list(found) == [""]:
            raise MergeidError(f"outputs names {name!r}, but the model returns one tensor; leave outputs out")
        if not hits:
            raise MergeidError(
                f"outputs names {name!r}, but the model returns {', '.join(map(repr, found))}; name one of these"
            )
        out.update(hits)
    return out


class ModuleAdapter:
    """Calls a live module as it is: positional inputs (`arg0`, `arg1`, …) in their order, all others by keyword."""

    name = "torch"

    def __init__(self, library: KnowsModules | None = None, *, takes_labels: bool = False) -> None:
        """Args:
        library: the adapter of the library that the module comes from: it knows by-products.
        takes_labels: `labels` are one of its inputs, and no targets."""
        self.library, self.takes_labels = library, takes_labels
        self.writes = False
        """Whether the model was seen to write into its inputs, which the next pass needs as they are."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return next(iter(self.outputs(model, batch).values()))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        from mergeid.basics.nested import returned_tensors

        return returned_tensors(self.whole_outputs(model, batch))

    def whole_outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Every tensor that a caller reads, whatever kind of numbers it holds."""
        from mergeid.basics.nested import dense_tensors, mapped, named_tensors, returned_tensors
        from mergeid.basics.untouched import one_pass

        inputs = {k: v for k, v in batch.items() if k != "labels" or self.takes_labels}
        if self.writes:
            inputs = mapped(inputs, lambda t: t.clone())
        given = [t for t in named_tensors(inputs).values() if not t.is_inference()]
        before = [t._version for t in given]
        positional = [inputs.pop(k) for k in sorted((k for k in inputs if POSITION.fullmatch(k)), key=_position)]
        with one_pass(model) as lasting:
            found = {k: lasting(t) for k, t in dense_tensors(model(*positional, **inputs)).items()}
        self.writes = self.writes or before != [t._version for t in given]
        numbers = list(returned_tensors(found))
        if not numbers:
            raise MergeidError(
                f"{type(model).__name__} returned no floating-point tensor; expected at least one, to check that "
                f"permuting its neurons leaves its function unchanged"
            )
        if self.library is None:
            return found
        kept = self.library.interface(numbers) or numbers
        kept += [k for k in self.library.interface(list(found)) if k not in numbers]
        if len(kept) > 1 and self.takes_labels:  # the loss is made of the other outputs
            kept = [k for k in kept if k != "loss"]
        return {k: found[k] for k in kept}

    def logits(self, model: nn.Module) -> str | None:
        """Name of the output that holds class logits, where the library knows that."""
        return self.library.logits(model) if isinstance(self.library, KnowsHeads) else None

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """`class_loss` of `labels` that are targets."""
        return None if self.takes_labels else class_loss(output, batch.get("labels"))

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        return None

    def preprocessing(self, arch: Architecture) -> Mapping[str, Any]:
        return {}


def class_loss(output: Tensor, labels: Any) -> LossParts | None:
    """Cross-entropy where `labels` are class numbers, one for each row of the output's last dimension (`IGNORED`:
    none), summed per example; None for any others."""
    import torch
    from torch.nn.functional import cross_entropy

    from mergeid.data.batching import IGNORED

    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return None
    if output.dim() < 2 or labels.shape != output.shape[:-1]:
        return None
    if ((labels != IGNORED) & ((labels < 0) | (labels >= output.shape[-1]))).any():  # numbers of something else
        return None
    rows = cross_entropy(output.flatten(0, -2).float(), labels.flatten().long(), reduction="none")
    each, right, counted = (t.reshape(len(labels), -1) for t in (rows, output.argmax(-1) == labels, labels != IGNORED))
    return LossParts(each.sum(1), (right & counted).sum(1), counted.sum(1))


def _position(name: str) -> int:
    found = POSITION.fullmatch(name)
    return int(found[1]) if found else -1


def takes_labels(module: nn.Module, inputs: Batch) -> bool:
    """Whether the `labels` of a live module's example inputs are an argument of its forward; else they are targets."""
    try:
        return "labels" in inputs and "labels" in signature(module.forward).parameters
    except ValueError:  # compiled code has no signature
        return False


def check_runs(loaded: Loaded, batch: Batch, what: str) -> None:
    """Raises `MergeidError`, in one sentence, where the model does not run on a batch."""
    import torch

    from mergeid.basics.nested import mapped

    try:
        with torch.no_grad():
            loaded.outputs(loaded.model, mapped(batch, lambda t: t.clone()))
    except MergeidError:
        raise
    except Exception as error:  # whatever a foreign forward does wrong
        text = " ".join(str(error).split())[:200]
        said = f"{type(error).__name__}: {text}" if text else type(error).__name__
        cure = "expected what its forward takes: a tensor, a tuple of positional inputs, or a dict of keywords"
        if loaded.checkpoint is not None:
            cure = "merge the tensors as is with --match never, or load the model and give example_inputs in Python"
        raise MergeidError(f"{loaded.source} does not run on {what} ({said}); {cure}") from error


def further_batches(inputs: Iterable[Any] | None, loaded: Loaded) -> list[Batch]:
    """More example inputs of a live module as batches."""
    return [loaded.inputs_of(as_batch(x)) for x in (() if inputs is None else inputs)]
