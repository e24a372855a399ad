"""The models of a merge, each with its neurons in the first one's order, and what is computed from them in memory."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.basics.casting import holds_numbers
from mergeid.basics.on_demand import EVERYTHING, OnDemand, Rows, rows_of, with_other_names
from mergeid.basics.state import load_weights
from mergeid.combine.asymmetric import effective_averages
from mergeid.combine.by_torch import combine, whole
from mergeid.data.batches import input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings, MethodRequest
from mergeid.methods.statistics import Gram, fisher_diagonal, gram_matrices
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded
from mergeid.nn.names import is_asymmetric
from mergeid.plugins import Batch
from mergeid.request.request import Run
from mergeid.results.plan import Plan

NOTHING = 1e-8
"""A sum of weights up to this size is none that could be divided by."""


@dataclass
class Member:
    """One model.

    Attributes:
        loaded: the model.
        plan: how it is brought into the first one's order; None for the first itself.
    """

    loaded: Loaded
    plan: Plan | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights as they lie."""
        if not self._state:
            self._state = self.loaded.state()
        return self._state

    def tensor(self, key: str) -> Tensor:
        """One tensor in the first model's order."""
        value = self.state[key]
        return value if self.plan is None else self.plan.carry(key, value)

    def aligned(self) -> dict[str, Tensor]:
        """All weights in the first model's order."""
        return {key: self.tensor(key) for key in self.state}


@dataclass
class Members:
    """All models of a merge.

    Attributes:
        models: the first, then the others.
        base: the base model, for methods that need one.
        settings: method, weights and parameters, by the names of the first model's tensors.
        examples: calibration data; None without.
        statistics: per model, state-dict key -> what the method needs.
        leans: number of the model that hidden layers of a leaning merge imitate; None: the most trusted one.
    """

    models: list[Member]
    base: Member | None
    settings: MergeSettings
    examples: Examples | None = None
    statistics: list[dict[str, Any]] | None = None
    leans: int | None = None

    @property
    def first(self) -> Loaded:
        return self.models[0].loaded

    @property
    def given(self) -> Examples:
        """The calibration data, of a merge that has some."""
        assert self.examples is not None
        return self.examples

    @property
    def everyone(self) -> list[Member]:
        """The models and, last, the base."""
        return [*self.models, *([self.base] if self.base is not None else [])]

    @property
    def plans(self) -> list[Plan]:
        """Those of every further model and, last, the base."""
        return [m.plan for m in self.everyone if m.plan is not None]

    def weights(self) -> list[float]:
        """What each model weighs in all: where weights differ by tensor, their mean over all numbers."""
        plain = [float(w) for w in self.settings.weights if isinstance(w, (int, float))]
        if len(plain) == len(self.models):
            return plain
        return self._mean_weights

    @functools.cached_property
    def _mean_weights(self) -> list[float]:
        names, sums, total = self.names(), [0.0] * len(self.models), 0
        for key, value in self.first.state().items():
            name, size = names.get(key, key), value.numel()
            if not value.is_floating_point() or name in self.settings.added:
                continue
            with contextlib.suppress(MergeidError):  # a tensor that is not merged needs no weight
                sums = [s + size * w for s, w in zip(sums, self.settings.weights_of(name), strict=True)]
                total += size
        return [s / total for s in sums] if total else [1.0] * len(self.models)

    def shares(self, name: str | None = None) -> list[float]:
        """What each model counts in what is imitated, with sum 1: in all, or in the tensor of that name. Equal shares
        where the weights sum to nothing."""
        weights = self.weights() if name is None else self.settings.weights_of(name)
        total = sum(weights)
        return [w / total for w in weights] if abs(total) > NOTHING else [1 / len(weights)] * len(weights)

    def names(self) -> dict[str, str]:
        """State-dict key -> the tensor's name in the first model's files."""
        return self.first.called

    def batches(self, batch_size: int, device: str) -> Iterator[Batch]:
        """The calibration data on a device, in the first model's number format."""
        for batch in self.given.batches(batch_size):
            yield to_model(batch, torch.device(device), input_dtype(self.first.model))

    def workspaces(self) -> Iterator[nn.Module]:
        """One model after the other with its weights in the first one's order, all in the same copy of it."""
        work = copy.deepcopy(self.first.model)
        for member in self.models:
            load_weights(work, member.aligned())
            yield work

    def measured(self, run: Run) -> Members:
        """The same with what the method needs measured on the calibration data (`statistics`)."""
        kind = self.settings.method.statistics
        if kind is None:
            return self
        what = "Gram matrices" if kind == "gram" else "Fisher information"
        found: list[dict[str, Any]] = []
        for i, work in enumerate(self.workspaces()):
            run.tell(f"measuring {what}", i, len(self.models))
            batches, net = self.batches(run.batch_size, run.place), work.to(run.place)
            if kind == "gram":
                found.append(gram_matrices(net, batches, forward=self.first.forward))
            else:
                found.append(fisher_diagonal(net, batches, forward=self.first.forward, generator=run.generator()))
        return replace(self, statistics=found)

    def statistics_of(self, key: str) -> list[Gram | Tensor | None] | None:
        """One entry per model for this tensor."""
        return None if self.statistics is None else [found.get(key) for found in self.statistics]

    def merged_tensors(self, skip: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors one after the other, under the model's keys, each of them as soon as it is made."""
        return merged_tensors(
            [m.state for m in self.models],
            self.settings,
            tensor=lambda i, key: self.models[i].tensor(key),
            base=self.base.tensor if self.base is not None else None,
            statistics=self.statistics_of,
            names=self.names(),
            skip=skip,
        )

    def merged_state(self, skip: Sequence[str] = ()) -> dict[str, Tensor]:
        """The merged state dict in memory, under the model's keys."""
        return dict(self.merged_tensors(skip))


def _when_used(
    settings: MergeSettings,
    name: str,
    ours: OnDemand,
    reads: Sequence[Callable[[], Tensor]],
    base: Callable[[], Tensor] | None,
    statistics: Sequence[Any] | None,
) -> OnDemand:
    """A merged tensor that is formed when it is used; some rows of it where the method goes element by element."""
    method = settings.method
    by_rows = method.elementwise and not method.seeded and not method.statistics

    def rows(which: Rows) -> Tensor:
        part = which if by_rows else EVERYTHING
        tensors = [rows_of(read(), part) for read in reads]
        origin = None if base is None else rows_of(base(), part)
        found = whole(combine(settings, name, tensors, origin, statistics), tensors[0])
        return found if by_rows else found[which]

    return OnDemand(rows, ours.shape, ours.dtype, ours.device)


def skipped_in(state: Mapping[str, Tensor], names: Mapping[str, str], skip: Sequence[str]) -> set[str]:
    """Keys of a state dict whose tensors are not merged, under any of their names.

    Args:
        names: key -> the name that `skip` goes by; default: the key. skip: globs.
    """
    return with_other_names(state, [k for k in state if any(fnmatchcase(names.get(k, k), p) for p in skip)])


def merged_tensors(
    states: Sequence[Mapping[str, Tensor]],
    settings: MergeSettings,
    *,
    tensor: Callable[[int, str], Tensor] | None = None,
    base: Callable[[str], Tensor] | None = None,
    statistics: Callable[[str], Sequence[Any] | None] = lambda key: None,
    names: Mapping[str, str] | None = None,
    skip: Sequence[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Merge state dicts in memory, tensor by tensor.

    Args:
        states: one per model, as they lie.
        settings: method, weights and parameters.
        tensor: (model, key) -> its tensor in the first model's order; default: as it lies.
        base: key -> the base model's tensor.
        statistics: key -> one entry per model, or None.
        names: key -> the name that settings and `skip` go by; default: the key.
        skip: globs of names to take from the first model as they are.

    Yields:
        (key of the first model's, tensor). What holds no floating-point or complex numbers, or is not in all models
        with one shape, is the first one's.
    """
    read = tensor or (lambda i, key: states[i][key])
    base = base if settings.method.base else None
    known = names or {}

    skipped = skipped_in(states[0], known, skip)

    def merges(key: str, ours: Tensor) -> bool:
        fits = all(key in s and s[key].shape == ours.shape for s in states)
        return fits and holds_numbers(ours) and key not in skipped

    done = [key for key, ours in states[0].items() if merges(key, ours)]
    made: dict[str, Tensor] = {}
    if is_asymmetric(done):
        made = effective_averages(
            done,
            [partial(read, i) for i in range(len(states))],
            lambda key, tensors, origin: whole(combine(settings, known.get(key, key), tensors, origin), tensors[0]),
            base,
        )
    chosen = set(done)
    for key, ours in states[0].items():
        if key in made or key not in chosen:
            yield key, made.get(key, ours).clone()
            continue
        if isinstance(ours, OnDemand):
            origin_of = None if base is None else partial(base, key)
            reads = [partial(read, i, key) for i in range(len(states))]
            yield key, _when_used(settings, known.get(key, key), ours, reads, origin_of, statistics(key))
            continue
        tensors = [read(i, key) for i in range(len(states))]
        origin = None if base is None else base(key)
        yield key, whole(combine(settings, known.get(key, key), tensors, origin, statistics(key)), ours)


def averaged_pair(a: Loaded, b: Loaded, plan: Plan, examples: Examples) -> Members:
    """The plain average of two models, the second one as planned."""
    names = [n for n, k in a.names.items() if a.state()[k].is_floating_point()]
    added = frozenset(a.joined.tensors if a.joined is not None else ())
    settings = MethodRequest(get_method("linear"), added=added).over(2, names)
    return Members([Member(a), Member(b, plan)], None, settings, examples)
