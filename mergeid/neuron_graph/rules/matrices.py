"""Functions of square matrices, and tensors with a diagonal: what happens to rows and columns that move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.neuron_graph.combine import combine, elementwise, relate
from mergeid.neuron_graph.layout import FROZEN, LABELLED, Fine, Group, Layout, uniform
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.reduction import normalised

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


def _matrix(call: Call, name: str) -> Layout:
    """A matrix whose rows and columns move as such, whatever their positions were before."""
    layout = call.layout(name)
    n = len(layout.dims)
    for dims in ([n - 1], [n - 2], [n - 2, n - 1]):
        layout = normalised(call, layout, dims)
    return layout


def _transposed(layout: Layout) -> Layout:
    return layout.with_dims((*layout.dims[:-2], layout.dims[-1], layout.dims[-2]))


def _square(call: Call, name: str) -> Layout:
    """A matrix whose rows and columns move together."""
    layout = _matrix(call, name)
    relate(call.facts, layout, _transposed(layout), call.why)
    return layout


@rule("linalg_inv_ex")
def inverse(call: Call) -> list[Layout | None]:
    """(P A Q)⁻¹ = Qᵀ A⁻¹ Pᵀ: rows become columns."""
    return [_transposed(_matrix(call, "A")), None]


@rule("linalg_pinv")
def pseudoinverse(call: Call) -> Layout:
    """(P A Q)⁺ = Qᵀ A⁺ Pᵀ."""
    return _transposed(_matrix(call, "self"))


@rule("_linalg_solve_ex")
def solve(call: Call) -> list[Layout | None]:
    """A X = B, B [..., i, k] -> X [..., j, k]: equations are summed over, unknowns are A's columns."""
    a, b = _matrix(call, "A"), call.layout("B")
    vector = call["B"].dim() == call["A"].dim() - 1
    if not call["left"] or (not vector and len(b.dims) != len(a.dims)):
        for layout in (a, b):
            call.facts.freeze(layout.all_labels, call.why)
        return [uniform(t.shape, FROZEN, a.data or b.data) for t in call.outputs()]
    lead = list(range(len(a.dims) - 2))
    right = [] if vector else ["k"]
    out = combine(call.facts, [(a, [*lead, "i", "j"]), (b, [*lead, "i", *right])], [*lead, "j", *right], call.why)
    return [out, *(None for _ in call.outputs()[1:])]


@rule("linalg_matrix_exp")
def power_series(call: Call) -> Layout:
    """f(P A Pᵀ) = P f(A) Pᵀ: rows and columns move together."""
    return _square(call, "self")


@rule("_linalg_det", "_linalg_slogdet")
def determinant(call: Call) -> list[Layout | None]:
    """|P A Pᵀ| = |A|. What else is returned is for gradients."""
    data = _square(call, "A").data
    values = call.outputs()[: len(call.outputs()) - 2]
    return [*(uniform(t.shape, FROZEN, data) for t in values), None, None]


@rule("_linalg_eigh")
def eigen(call: Call) -> list[Layout | None]:
    """P A Pᵀ = (P V) Λ (P V)ᵀ: values stay, and of the vectors the rows move, up to their signs."""
    layout, (values, vectors) = _square(call, "A"), call.outputs()
    found = uniform(values.shape, FROZEN, layout.data)
    if not call["compute_v"]:
        return [found, None]
    lead = range(len(layout.dims) - 2)
    rows = combine(call.facts, [(layout, [*lead, "i", "j"])], [*lead, "i"], call.why)
    column = Fine(vectors.shape[-1], FROZEN)
    return [found, Layout((*rows.dims, (column,)), rows.groups, rows.data)]


@rule("_linalg_svd")
def singular(call: Call) -> list[Layout | None]:
    """P A Q = (P U) Σ (Vᵀ Q): values stay, and of the vectors the rows of U and the columns of Vᵀ move, up to signs."""
    layout, (left, values, right) = _matrix(call, "A"), call.outputs()
    found = uniform(values.shape, FROZEN, layout.data)
    if not call["compute_uv"]:
        return [None, found, None]
    lead = range(len(layout.dims) - 2)
    rows, columns = (combine(call.facts, [(layout, [*lead, "i", "j"])], [*lead, x], call.why) for x in "ij")
    held = [(Fine(n, FROZEN),) if n > 1 else () for n in (left.shape[-1], right.shape[-2])]
    return [
        rows.with_dims((*rows.dims, held[0])),
        found,
        columns.with_dims((*columns.dims[:-1], held[1], columns.dims[-1])),
    ]


@rule("linalg_cross")
def cross(call: Call) -> Layout:
    """The three coordinates have an order."""
    layouts = [call.layout("self"), call.layout("other")]
    layouts = [call.freeze_dims(x, [call["dim"] % len(x.dims)]) for x in layouts]
    return elementwise(call.facts, layouts, call.out.dim(), call.why)


@rule("trace")
def trace(call: Call) -> Layout:
    layout = _matrix(call, "self")
    if layout.shape[0] == layout.shape[1]:
        relate(call.facts, layout, _transposed(layout), call.why)
    else:
        call.facts.freeze(layout.all_labels, call.why)
    return uniform((), FROZEN, layout.data)


@rule("diag_embed")
def diag_embed(call: Call) -> Layout:
    """[..., n] -> [..., n, n], zero off the diagonal: rows and columns are the same neurons."""
    layout = call.layout("self")
    n = len(layout.dims)
    (fine,) = layout.dims[-1] if len(layout.dims[-1]) == 1 else (None,)
    group = layout.group_of(fine) if fine is not None and fine.kind == LABELLED else None
    last = {call["dim1"] % (n + 1), call["dim2"] % (n + 1)} == {n - 1, n}
    if fine is None or group is None or group.fines != (fine,) or call["offset"] or not last:
        call.facts.freeze(layout.all_labels, call.why)
        return uniform(call.out.shape, FROZEN, layout.data)
    column = Fine(fine.size, LABELLED)
    return Layout((*layout.dims, (column,)), (*layout.groups, Group(group.labels, (column,))), layout.data)
