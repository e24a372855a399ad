"""What a matcher is, and the registry that finds them.

A matcher takes two models of one neuron graph and returns the group element that brings B into A's order. Third-party
matchers register a class without arguments under the entry-point group ``mergeid.matchers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from mergeid.errors import MergeidError
from mergeid.plugins import Batch, near_names

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

ENTRY_POINT_GROUP = "mergeid.matchers"

Needs = Literal["weights", "activations", "labels"]


@dataclass(frozen=True)
class Training:
    """A model that can be differentiated, with labelled data.

    Attributes:
        model: A's module; its weights are left as they are.
        forward: (model, batch) -> output.
        loss: (output, batch) -> mean loss, a scalar in nats; None where the batch has no labels or the model no loss.
        batches: starts a new pass over the data.
    """

    model: nn.Module
    forward: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[Tensor, Batch], Tensor | None]
    batches: Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class MatchTask:
    """What a matcher may use.

    Attributes:
        graph: the neuron graph of both models.
        a, b: state dicts; every tensor of the graph is in both.
        generator: of every draw.
        correlation: space id -> [size, size] Pearson correlations of A's and B's activations; None without data.
        training: None without data.
    """

    graph: NeuronGraph
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    generator: Generator
    correlation: Mapping[str, np.ndarray] | None = None
    training: Training | None = None


@runtime_checkable
class Matcher(Protocol):
    """The protocol.

    Attributes:
        name: what ``--matcher`` calls it.
        needs: "weights": the state dicts alone; "activations": also `MatchTask.correlation`; "labels": also
            `MatchTask.training`.
    """

    name: str
    needs: Needs

    def match(self, task: MatchTask) -> Element:
        """The element to apply to B. Raises `MergeidError` where the task lacks what it needs."""
        ...


@runtime_checkable
class JointMatcher(Matcher, Protocol):
    """A matcher that brings any number of models into one common order at once."""

    def match_all(
        self,
        graph: NeuronGraph,
        states: Sequence[Mapping[str, Tensor]],
        generator: Generator,
        correlations: Mapping[tuple[int, int], Mapping[str, np.ndarray]] | None = None,
        judge: Callable[[Sequence[Element]], float] | None = None,
    ) -> list[Element]:
        """One element per model, which brings it into the common order (the universe).

        Args:
            correlations: (p, q) with p < q -> space id -> [size, size] correlations of both models' activations; None
                without data.
            judge: how far the average of the models in a common order is from what they say, lower is better; None
                without data.
        """
        ...


_BUILT_IN = {
    "activation": "mergeid.matchers.activation:ActivationMatcher",
    "combined": "mergeid.matchers.activation:CombinedMatcher",
    "cycle": "mergeid.matchers.cycle:CycleMatcher",
    "layerwise": "mergeid.matchers.layerwise:LayerwiseMatcher",
    "ot": "mergeid.matchers.transport:TransportMatcher",
    "sinkhorn": "mergeid.matchers.sinkhorn:SinkhornMatcher",
    "straight_through": "mergeid.matchers.straight_through:StraightThroughMatcher",
    "weight": "mergeid.matchers.weight:WeightMatcher",
}
_registered: dict[str, Matcher] = {}


@cache
def _entry_points() -> dict[str, Any]:
    return {e.name: e for e in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)}


def register_matcher(matcher: Matcher) -> None:
    """Add a matcher by hand (notebooks, tests). Raises ValueError on a duplicate name."""
    if matcher.name in matcher_names():
        raise ValueError(f"matcher {matcher.name!r} is registered already")
    _registered[matcher.name] = matcher


def matcher_names() -> list[str]:
    """All names that ``--matcher`` accepts, without importing their modules."""
    return sorted({*_BUILT_IN, *_entry_points(), *_registered})


def get_matcher(name: str) -> Matcher:
    """The matcher of that name, imported on first use. Raises `MergeidError` for an unknown one, with near names."""
    if name not in _registered:
        if name in _BUILT_IN:
            module, attribute = _BUILT_IN[name].split(":")
            found = getattr(import_module(module), attribute)
        elif name in _entry_points():
            found = _entry_points()[name].load()
        else:
            near = near_names(name, matcher_names(), n=2)
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            raise MergeidError(f"--matcher {name!r} is unknown{hint}; expected one of {', '.join(matcher_names())}")
        _registered[name] = found()
    return _registered[name]


def check_matcher(name: str | None, match: str, data: bool) -> Matcher | None:
    """The matcher that was asked for, before long work; None: the usual one.

    Raises `MergeidError` for an unknown name, where nothing is matched, and where it cannot do without data."""
    if name is None:
        return None
    found = get_matcher(name)
    if match == "never":
        raise MergeidError(f"--matcher {name} has nothing to match with --match never; give --match auto or always")
    if not data and found.needs != "weights":
        what = "labelled examples" if found.needs == "labels" else "examples to run the models on"
        raise MergeidError(f"--matcher {name} needs {what}; give them with --data")
    if not data and match == "auto" and name != "weight":
        raise MergeidError(
            f"--matcher {name} is judged on examples with --match auto; give them with --data, or accept its match "
            f"unjudged with --match always"
        )
    return found
