"""What is expensive, done once: every checkpoint opened, every model built, traced and proven, every data set read."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.opening import Source, module_of, open_checkpoint
from mergeid.request.request import Calibration, Example, Reading, Run

if TYPE_CHECKING:  # a plain merge builds no model and never loads torch
    from mergeid.io.checkpoint import Checkpoint
    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded
    from mergeid.neuron_graph.neuron_graph import NeuronGraph

Made = TypeVar("Made")


class Workbench:
    """Holds what a verb has opened, built, traced and read, so that nothing is done twice.

    Args:
        reading: how models are read.
        run: how the work is done.
    """

    def __init__(self, reading: Reading, run: Run) -> None:
        self.reading, self.run = reading, run
        self._opened: dict[object, tuple[Source, Checkpoint]] = {}
        self._loaded: dict[object, tuple[Source, Loaded]] = {}
        self._graphs: dict[int, tuple[Loaded, NeuronGraph]] = {}
        self._examples: dict[tuple[int, int | None], tuple[Calibration, Examples]] = {}
        self._done: set[object] = set()
        self._made: dict[Hashable, tuple[object, Any]] = {}

    def open(self, source: Source) -> Checkpoint:
        """The weights that `source` means. Raises `MergeidError` for what cannot be read."""
        key = key_of(source)
        if key not in self._opened:
            asked = self.reading
            found = open_checkpoint(source, allow_pickle=asked.allow_pickle, dequantise=asked.dequantise)
            self._opened[key] = source, found
        return self._opened[key][1]

    def load(self, source: Source, like: Loaded | None = None) -> Loaded:
        """A model that runs.

        Args:
            like: an earlier model of the same library and architecture, whose adapter builds this one too.

        Raises `MergeidError` where it cannot be built or run.
        """
        module = module_of(source)
        key = key_of(source if module is None else module)
        if key not in self._loaded:
            self.run.tell("loading", len(self._loaded), len(self._loaded) + 1)
            self._loaded[key] = source, self._load(source, like)
        return self._loaded[key][1]

    def graph(self, loaded: Loaded) -> NeuronGraph:
        """The verified neuron graph of a loaded model, over the keys of its state dict."""
        key = id(loaded)
        if key not in self._graphs:
            self.run.tell("tracing and verifying the neuron graph", 0, 1)
            self._graphs[key] = loaded, _agreed(loaded, self.run)
        return self._graphs[key][1]

    def common_graph(self, a: Loaded, b: Loaded) -> NeuronGraph:
        """The graph of A, verified on B too where an order of neurons may be written in whole numbers that differ."""
        graph = self.graph(a)
        orders = _other_orders(a, b)
        if not orders:
            return graph

        def verified() -> NeuronGraph:
            from mergeid.models.graph import graph_of

            more = f" (and in {len(orders) - 1} more tensors)" if len(orders) > 1 else ""
            warnings.warn(
                f"the whole numbers in {orders[0]!r}{more} of {a.source} and {b.source} differ, and a merge takes the "
                "first model's; neurons whose order hangs on them are not matched",
                MergeidWarning,
                stacklevel=6,
            )
            return graph_of(b, seed=self.run.seed, given=graph)

        return self.kept(("common graph", id(a), id(b)), (a, b), verified)

    def examples(self, asked: Calibration, loaded: Loaded) -> Examples | None:
        """The examples that were asked for, as this model takes them; None where none are given."""
        if not asked.given:
            return None
        from mergeid.models.examples import examples_of

        key = id(asked.data), asked.limit
        if key not in self._examples:
            found = examples_of(asked.data, loaded, asked.limit, self.run.seed, self.reading.image_size)
            self._examples[key] = asked, found
        return self._examples[key][1]

    def kept(self, what: Hashable, about: object, work: Callable[[], Made]) -> Made:
        """What this work makes, made the first time only.

        Args:
            what: it is, with the identities of what it is made of.
            about: what it is made of, kept so that no identity comes to mean something else.
        """
        if what not in self._made:
            self._made[what] = about, work()
        found: Made = self._made[what][1]
        return found

    def once(self, what: object, work: Callable[[], None]) -> None:
        """Do this work if it was not done yet."""
        if what not in self._done:
            work()
            self._done.add(what)

    def under(self, reading: Reading) -> Workbench:
        """The same, where models are read in another way; what is open and loaded already stays so."""
        other = copy.copy(self)  # with the same tables
        other.reading = reading
        return other

    def apart(self) -> Workbench:
        """The same, where what is opened and loaded from now on is forgotten with it: for one of many models."""
        other = copy.copy(self)
        other._opened, other._loaded, other._graphs = dict(self._opened), dict(self._loaded), dict(self._graphs)
        other._examples, other._done = dict(self._examples), set(self._done)
        return other

    def _load(self, source: Source, like: Loaded | None) -> Loaded:
        from mergeid.models.architecture import find_architecture
        from mergeid.models.load import load_checkpoint, load_model

        if (module := module_of(source)) is not None:
            if like is None:
                return load_model(module, self.reading, self.run)
            given = self.reading.example
            again = given if given.inputs is not None else Example(like.example, given.outputs)
            found = load_model(module, dataclasses.replace(self.reading, example=again), self.run)
            return dataclasses.replace(found, adapter=like.adapter, arch=like.arch)
        checkpoint = self.open(source)
        if like is None:
            return load_checkpoint(checkpoint, *find_architecture(checkpoint, self.reading.arch), self.run)
        own = like.arch if checkpoint.config is None else find_architecture(checkpoint, self.reading.arch)[1]
        return load_checkpoint(checkpoint, like.adapter, own, self.run, like)


def key_of(source: Source) -> Hashable:
    """What is the same for one source, and differs between two."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else id(source)


def _other_orders(a: Loaded, b: Loaded) -> list[str]:
    """Keys of tensors of whole numbers or flags, more than one, that are other ones in B."""
    import torch

    from mergeid.basics.casting import holds_numbers
    from mergeid.basics.state import tensors_of

    theirs = tensors_of(b.model)
    return [
        key
        for key, mine in tensors_of(a.model).items()
        if not (holds_numbers(mine) or mine.is_meta)
        and mine.numel() > 1
        and (other := theirs.get(key)) is not None
        and not other.is_meta
        and (mine.shape != other.shape or not torch.equal(mine, other.to(mine.device)))
    ]


def _agreed(loaded: Loaded, run: Run) -> NeuronGraph:
    """The graph on which all architectures that fit the tensors agree. Raises `MergeidError` when they do not."""
    from mergeid.models.graph import graph_of
    from mergeid.models.load import load_checkpoint

    found = graph_of(loaded, seed=run.seed)
    arch, adapter = loaded.arch, loaded.adapter
    others = [c for c in arch.candidates if c != arch.name] if loaded.checkpoint is not None else []
    for name in others:
        assert loaded.checkpoint is not None
        candidate = dataclasses.replace(arch, name=name, candidates=())
        other = load_checkpoint(loaded.checkpoint, adapter, candidate, run)
        if _shape_of(graph_of(other, seed=run.seed)) != _shape_of(found):
            raise MergeidError(
                f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}, whose neuron graphs differ; "
                f"specify one with --arch, for example --arch {adapter.name}/{arch.name}"
            )
    if others:
        warnings.warn(
            f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}; their neuron graphs are the same, so "
            f"mergeid continues with {arch.name} (choose with --arch)",
            MergeidWarning,
            stacklevel=4,
        )
    return found


def _shape_of(found: NeuronGraph) -> Sequence[Any]:
    return [(s.size, s.blocks, s.parents, [(a.tensor, a.axis, a.index.tolist()) for a in s.axes]) for s in found.spaces]
