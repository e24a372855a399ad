"""Distances between rows, and products of three tensors: sums over the features that rows share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.neuron_graph.combine import combine, elementwise, reduce
from mergeid.neuron_graph.layout import FROZEN, Layout, uniform
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule("_euclidean_dist", "_cdist_forward")
def pairs(call: Call) -> Layout:
    """[…, N, K] and […, M, K] -> […, N, M]; the leading dimensions broadcast."""
    first, second = call.layout("x1"), call.layout("x2")
    lead = range(-len(call.out.shape), -2)
    a = [*lead[len(lead) - len(first.dims) + 2 :], "n", "k"]
    b = [*lead[len(lead) - len(second.dims) + 2 :], "m", "k"]
    return combine(call.facts, [(first, a), (second, b)], [*lead, "n", "m"], call.why)


@rule("_pdist_forward")
def own_pairs(call: Call) -> Layout:
    """[N, K] -> one distance for each pair of rows: the rows are fixed, features are summed."""
    layout = call.freeze_dims(call.layout("self"), [0])
    return uniform(call.out.shape, FROZEN, reduce(call.facts, layout, [1], False, call.why).data)


@rule("dist")
def apart(call: Call) -> Layout:
    """One distance of two tensors: all is summed."""
    layouts = [call.layout("self"), call.layout("other")]
    n = max(len(x.dims) for x in layouts)
    both = elementwise(call.facts, layouts, n, call.why)
    return uniform((), FROZEN, reduce(call.facts, both, list(range(n)), False, call.why).data)


@rule("_trilinear")
def trilinear(call: Call) -> Layout:
    """Three tensors with further dimensions of size 1 put in, multiplied, and summed over some dimensions."""
    n = len(call["expand1"]) + call["i1"].dim()
    operands = []
    for name, extra in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        operands.append((call.layout(name), [d for d in range(n) if d not in call[extra]]))
    return combine(call.facts, operands, [d for d in range(n) if d not in call["sumdim"]], call.why)
