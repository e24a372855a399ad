"""Places among neurons as numbers: of the largest, of the first k, in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import on, only, seeded, sound
from torch import Tensor, nn

X = (torch.randn(9, 6, generator=torch.Generator().manual_seed(0)),)
N = 8


class Between(nn.Module):
    """A function of hidden neurons between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = N) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, N), nn.Linear(width, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def written(x: Tensor) -> Tensor:
    values, places = x.topk(3)
    return torch.zeros_like(x).scatter_(-1, places, values.relu())


def written_at_rows(x: Tensor) -> Tensor:
    out, (values, places) = torch.zeros_like(x), x.topk(3)
    out[torch.arange(len(x))[:, None], places] = values
    return out


def over_the_batch(x: Tensor) -> Tensor:
    values, places = x.flatten().topk(20)
    return torch.zeros_like(x.flatten()).scatter(0, places, values).view_as(x)


def sparsemax(x: Tensor) -> Tensor:
    ordered = x.sort(-1, descending=True).values
    sums, count = ordered.cumsum(-1) - 1, torch.arange(1, N + 1).to(x)
    most = (count * ordered > sums).sum(-1, keepdim=True)
    return (x - sums.gather(-1, most - 1) / most).clamp(min=0)


def straight_through(x: Tensor) -> Tensor:
    soft = x.softmax(-1)
    return F.one_hot(soft.argmax(-1), N).to(x) - soft.detach() + soft


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "written back": written,
    "written back row by row": written_at_rows,
    "over the whole batch": over_the_batch,
    "at least the third": lambda x: x * (x >= x.topk(3).values[:, -1:]),
    "at least the third, sorted": lambda x: x * (x >= x.sort(-1).values[:, 5:6]),
    "at least the third, by kthvalue": lambda x: x.where(x >= x.kthvalue(6, keepdim=True).values, torch.zeros_like(x)),
    "at least the median": lambda x: x.relu() * (x > x.quantile(0.5, -1, keepdim=True)),
    "a mask of places": lambda x: x * torch.zeros_like(x).scatter_(-1, x.topk(3).indices, 1.0),
    "the largest alone": lambda x: x * F.one_hot(x.argmax(-1), N),
    "the largest alone, from max": lambda x: x * torch.zeros_like(x).scatter(-1, x.max(-1, keepdim=True)[1], 1.0),
    "two places, one after the other": lambda x: x * F.one_hot(x.topk(2).indices, N).sum(-2),
    "straight through": straight_through,
    "sparsemax": sparsemax,
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_activations_leave_neurons_exchangeable(name: str) -> None:
    graph = sound(lambda: Between(SPARSE[name]), X)
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 1)
    assert only(graph, "a.weight", 0).size == N and graph.unknown_ops == {}


RANKED: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted": lambda x: x.sort(-1).values,
    "the first": lambda x: x.topk(5).values,
    "read at places": lambda x: x.gather(-1, x.topk(5).indices),
    "read at places row by row": lambda x: x[torch.arange(len(x))[:, None], x.argsort(-1)],
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks_are_fixed_and_neurons_are_not(name: str) -> None:
    width = RANKED[name](torch.randn(2, N)).shape[1]
    graph = sound(lambda: Between(RANKED[name], width), X)
    assert only(graph, "a.weight", 0).size == N and not on(graph, "b.weight", 1)


FIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "a place as a number": lambda x: x * x.argmax(-1, keepdim=True),
    "the first place as a number": lambda x: x * x.topk(3).indices[:, :1],
    "a place that is compared": lambda x: x * (x.argmax(-1, keepdim=True) > 3),
    "a place beside a constant one": lambda x: x * (torch.arange(N) == x.argmax(-1, keepdim=True)),
    "the next place": lambda x: x * F.one_hot((x.argmax(-1) + 1) % N, N),
    "a place in another table": lambda x: x * torch.arange(2.0 * N).to(x)[x.argmax(-1)][:, None],
    "a place written down": lambda x: x * torch.zeros(len(x), 1).to(x).copy_(x.argmax(-1, keepdim=True)),
    "the order of places": lambda x: x * x.argsort(-1).argsort(-1),
    "places in a list": lambda x: x + x[:, x.mean(0).topk(3).indices.tolist()].sum(-1, keepdim=True),
    "places in an array": lambda x: x * torch.from_numpy(x.argmax(-1, keepdim=True).numpy()),
    "numbers in a list": lambda x: x * torch.tensor(x.detach().tolist()).to(x),
    "a running sum": lambda x: x.cumsum(-1),
}


@pytest.mark.parametrize("name", FIXING)
def test_who_reads_the_numbers_fixes_the_neurons(name: str) -> None:
    graph = sound(lambda: Between(FIXING[name]), X)
    assert not on(graph, "a.weight", 0)


class Pruned(nn.Module):
    """Neurons that the weights themselves choose, by their places or by numbers that are computed of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.table, self.how = nn.Linear(6, N), nn.Linear(N, 3), nn.Parameter(torch.randn(9, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "largest":
            kept = self.a.weight.norm(dim=1).topk(5).indices
            return F.linear(F.linear(x, self.a.weight[kept], self.a.bias[kept]).relu(), self.b.weight[:, kept])
        which = (2 * self.a.weight.norm(dim=1)).round().long().clamp(max=8)
        return self.b(F.linear(x, self.table[which]).relu() * self.a.bias)


@pytest.mark.parametrize("how", ["largest", "looked up"])
def test_weights_that_say_where_to_look(how: str) -> None:
    graph = sound(lambda: Pruned(how), X)
    neurons = only(graph, "a.weight", 0)
    assert neurons.size == N and only(graph, "b.weight", 1) is neurons and not on(graph, "table", 0)


class Routed(nn.Module):
    """Experts that data choose, their weights in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(6, N), nn.Linear(N, 5), nn.Linear(N, 3)
        self.up, self.down = nn.Parameter(torch.randn(5, N, 7)), nn.Parameter(torch.randn(5, 7, N))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        share, which = self.gate(x).softmax(-1).topk(2)
        inner = torch.einsum("bc,bkcm->bkm", x, self.up[which]).relu()
        return self.b(x + torch.einsum("bkm,bkmc,bk->bc", inner, self.down[which], share))


def test_experts_that_are_looked_up_change_places() -> None:
    graph = sound(Routed, X)
    experts = only(graph, "gate.weight", 0)
    assert experts.size == 5 and only(graph, "up", 0) is experts and only(graph, "down", 0) is experts
    assert only(graph, "up", 2) is only(graph, "down", 1)


class Decoded(nn.Module):
    """A sparse autoencoder that reads the rows of its decoder at the largest codes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.rows, self.how = nn.Linear(6, N), nn.Parameter(torch.randn(N, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        values, places = self.a(x).relu().topk(3)
        if self.how == "bag":
            return F.embedding_bag(places, self.rows, per_sample_weights=values, mode="sum")
        return (values[..., None] * self.rows[places]).sum(-2)


@pytest.mark.parametrize("how", ["bag", "index"])
def test_rows_of_a_decoder(how: str) -> None:
    graph = sound(lambda: Decoded(how), X)
    assert only(graph, "a.weight", 0) is only(graph, "rows", 0) and only(graph, "rows", 0).size == N


class Quantised(nn.Module):
    """The nearest entry of a table."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.table, self.b, self.how = nn.Linear(6, N), nn.Embedding(11, N), nn.Linear(N, 3), how

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.a(x)
        code = torch.cdist(x, self.table.weight).argmin(-1)
        found = F.one_hot(code, 11).to(x) @ self.table.weight if self.how == "product" else self.table(code)
        return (self.b(found), code) if self.how == "returned" else (self.b(found),)


@pytest.mark.parametrize("how", ["table", "product", "returned"])
def test_entries_of_a_codebook(how: str) -> None:
    graph = sound(lambda: Quantised(how), X)
    assert only(graph, "table.weight", 1) is only(graph, "b.weight", 1)
    assert [s.size for s in on(graph, "table.weight", 0)] == ([] if how == "returned" else [11])


class LookedUp(nn.Module):
    """Every neuron's own value says which row of a table is read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.table, self.b, self.how = nn.Linear(6, N), nn.Embedding(41, 2), nn.Linear(2 * N, 3), how

    def forward(self, x: Tensor) -> Tensor:
        which = (3 * self.a(x)).round().long().clamp(-20, 20) + 20
        w = self.table.weight
        if self.how == "embedding":
            found = self.table(which)
        elif self.how == "index":
            found = w[which]
        elif self.how == "select":
            found = w.index_select(0, which.flatten()).view(*which.shape, 2)
        else:
            found = torch.take(w, torch.stack([2 * which, 2 * which + 1], -1))
        return self.b(found.flatten(1))


@pytest.mark.parametrize("how", ["embedding", "index", "select", "take"])
def test_neurons_that_say_where_to_look(how: str) -> None:
    graph = sound(lambda: LookedUp(how), X)
    neurons = only(graph, "a.weight", 0)
    assert neurons.size == N
    below = {s.id for s in on(graph, "b.weight", 1)}
    assert neurons.id in {p for s in graph.spaces if s.id in below for p in s.parents} | below


class Written(nn.Module):
    """Neurons say at which fixed place others are written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(6, N), nn.Linear(6, N), nn.Linear(15, 3), how

    def forward(self, x: Tensor) -> Tensor:
        which = (3 * self.a(x[0])).round().long().clamp(-7, 7) + 7
        out, y = x.new_zeros(15, len(x)), self.b(x).t()
        if self.how == "add":
            out = out.index_add(0, which, y)
        elif self.how == "copy":
            out = out.index_copy(0, which, y)
        else:
            out[which] = y
        return self.c(out.t())


@pytest.mark.parametrize("how", ["add", "copy", "put"])
def test_neurons_that_say_where_to_write(how: str) -> None:
    """Sums come in any order; of what is written twice the last stays."""
    graph = sound(lambda: Written(how), X)
    assert [s.size for s in on(graph, "a.weight", 0)] == ([N] if how == "add" else [])
    assert on(graph, "a.weight", 0) == on(graph, "b.weight", 0) and not on(graph, "c.weight", 1)


def test_a_wrong_rule_would_be_seen() -> None:
    """The oracle of these tests: permuting neurons of a layer whose places are read changes the output."""
    model = seeded(lambda: Between(FIXING["a place as a number"]))
    before, order = model(X[0].double()), torch.arange(N).flip(0)
    with torch.no_grad():
        for value, axis in ((model.a.weight, 0), (model.a.bias, 0), (model.b.weight, 1)):
            value.copy_(value.index_select(axis, order))
    assert not torch.allclose(model(X[0].double()), before)
