"""OT fusion of networks whose layers differ in width (Singh and Jaggi 2020, "Model fusion via optimal transport").

Space by space from the input on, the entropic optimal transport plan T [n, m] between A's n and B's m neurons with
uniform masses, its cost 1 − the cosine of their incoming weights, B's with what comes before transported already. Rows
that write a space are averaged with n T, columns that read it are gathered with m T: each of B's neurons is taken for
the mean of A's that it goes to, so that B with each neuron split into equal parts gives B back. (The paper normalises
the columns by A's masses too, which for unequal widths changes the scale of what is read.)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log

import torch
from torch import Tensor, nn

from mergeid.basics.state import tensors_of
from mergeid.errors import MergeidError
from mergeid.matchers.layerwise import in_order
from mergeid.matchers.sides import side
from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, Space
from mergeid.neuron_graph.reals import in_reals, out_of_reals


def transport_widths(
    graphs: tuple[NeuronGraph, NeuronGraph],
    models: tuple[nn.Module, nn.Module],
    *,
    regularisation: float = 0.02,
    iterations: int = 500,
) -> dict[str, Tensor]:
    """B's state dict in A's shapes, its neurons where A's most similar ones are.

    Args:
        graphs, models: A's and B's, of the same layers; the spaces have no spaces inside (heads).
        regularisation: weight of the entropy; costs lie in [0, 2]. The smaller, the closer to a hard assignment.
        iterations: of Sinkhorn's algorithm for every space.

    Raises `MergeidError` where the graphs do not have the same spaces on the same axes, or spaces lie in others.
    """
    partner = _partners(*graphs)
    as_they_are = tensors_of(models[1])
    graph, (a,) = in_reals(graphs[0], tensors_of(models[0]))
    its_graph, (b,) = in_reals(graphs[1], as_they_are)
    graphs = graph, its_graph
    plans: dict[str, Tensor] = {}
    for space in in_order(graph):
        x, y = [], []
        for axis in space.axes:
            other = [s.id for s, found in graph.on_tensor[axis.tensor] if found.axis != axis.axis]
            if side(graph, models[0], axis.tensor, axis.axis) == "in" or any(s not in plans for s in other):
                continue
            theirs = _axis(partner[space.id], axis)
            moved = _moved(graphs, models[0], plans, axis.tensor, b[axis.tensor], skip=axis.axis)
            own = _rows(a[axis.tensor], axis)
            scale = float(own.square().mean().sqrt().clamp(min=1e-12))
            x.append(own / scale)
            y.append(_rows(moved, theirs) / scale)
        if not x:
            raise MergeidError(f"no layer that writes {space.label!r} is matched yet, so its widths cannot be matched")
        cosines = nn.functional.normalize(torch.cat(x, 1)) @ nn.functional.normalize(torch.cat(y, 1)).T
        plans[space.id] = plan(cosines / regularisation, iterations)
    found = {k: _moved(graphs, models[0], plans, k, v) if k in graph.on_tensor else v.clone() for k, v in b.items()}
    return out_of_reals(found, as_they_are)


def plan(logits: Tensor, iterations: int) -> Tensor:
    """[n, m] ≥ 0 with row sums 1 / n and column sums 1 / m, of the form diag(u) exp(logits) diag(v); float64."""
    value = logits.double()
    for _ in range(iterations):
        value = value - value.logsumexp(1, keepdim=True) - log(value.shape[0])
        value = value - value.logsumexp(0, keepdim=True) - log(value.shape[1])
    return value.exp()


def _partners(a: NeuronGraph, b: NeuronGraph) -> dict[str, Space]:
    """A's space id -> B's space on the same axes."""
    if any(s.parents for s in a.spaces):
        raise MergeidError(f"{a.model} has spaces inside spaces (heads); widths are matched for plain layers only")
    there = {frozenset((x.tensor, x.axis) for x in s.axes): s for s in b.spaces}
    found = {}
    for s in a.spaces:
        key = frozenset((x.tensor, x.axis) for x in s.axes)
        if key not in there:
            raise MergeidError(f"{b.model} has no space on the axes of {s.label!r} of {a.model}: other layers")
        if any(x.positions.size < len(x.index) for y in (s, there[key]) for x in y.axes):
            raise MergeidError(f"parts of an axis of {s.label!r} are frozen; its widths cannot be matched")
        found[s.id] = there[key]
    return found


def _axis(space: Space, like: AxisMap) -> AxisMap:
    return next(x for x in space.axes if (x.tensor, x.axis) == (like.tensor, like.axis))


def _rows(value: Tensor, axis: AxisMap) -> Tensor:
    front = value.double().movedim(axis.axis, 0)
    return front[torch.from_numpy(axis.positions)].reshape(len(axis.members), -1)


def _moved(
    graphs: tuple[NeuronGraph, NeuronGraph],
    model: nn.Module,
    plans: Mapping[str, Tensor],
    tensor: str,
    value: Tensor,
    skip: int | None = None,
) -> Tensor:
    """One of B's tensors with its axes transported, but for one of them."""
    out = value.double()
    theirs = {x.axis: x for _, x in graphs[1].on_tensor[tensor]}
    for space, axis in graphs[0].on_tensor[tensor]:
        if axis.axis == skip:
            continue
        t = plans[space.id]
        reads = side(graphs[0], model, tensor, axis.axis) == "in"
        matrix = t * (t.shape[1] if reads else t.shape[0])
        moved = matrix @ _rows(out, theirs[axis.axis])
        rest = out.movedim(axis.axis, 0).shape[1:]
        new = out.new_zeros((len(axis.index), *rest))
        new[torch.from_numpy(axis.positions).reshape(-1)] = moved.reshape(-1, *rest)
        out = new.movedim(0, axis.axis)
    return out.to(value.dtype)
