"""Networks whose graph was wrong or poor once, each reduced to the operation that was to blame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph_helpers import call, only, seeded, sound, traced
from torch import nn

from mergeid.neuron_graph.verify import verify

ROWS = (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),)


class Remembers(nn.Module):
    """Keeps a value derived from its weights until the mode changes, as LeViT and EfficientFormer do."""

    def __init__(self):
        super().__init__()
        self.inner, self.out, self.bias = nn.Linear(6, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(8))
        self.kept = None

    def train(self, mode=True):
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.kept is None:
            self.kept = self.bias * 2
        return self.out((self.inner(x) + self.kept).tanh())


def test_values_kept_from_an_earlier_run_are_not_constants():
    model = seeded(Remembers)
    x = ROWS[0].double()
    call(model, (x,))
    graph = traced(model, (x,))
    assert only(graph, "bias", 0) is only(graph, "inner.weight", 0)
    checked = verify(graph, model, (x,), call, generator=torch.Generator().manual_seed(0))
    assert checked.failed == () and checked.error < 1e-9


class OneHot(nn.Module):
    """A table read by one-hot rows of constant places: zeros that are no longer alike once they are written to."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Parameter(torch.randn(7, 8)), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        places = torch.arange(len(x))
        rows = torch.zeros(len(x), 7).to(self.table).scatter_(1, places[:, None], 1.0)
        return self.b((self.a(x) + rows @ self.table).tanh())


def test_places_written_into_zeros_are_fixed():
    graph = sound(OneHot, ROWS)
    assert {s.size for s in graph.spaces} == {8}
    assert only(graph, "table", 1).size == 8


class FilledRows(OneHot):
    def forward(self, x):
        rows = torch.zeros(len(x), 7).to(self.table).index_fill_(1, torch.tensor([2, 5]), 1.0)
        return self.b((self.a(x) + rows @ self.table).tanh())


def test_a_fill_at_fixed_places_fixes_them():
    assert {s.size for s in sound(FilledRows, ROWS).spaces} == {8}


class FactorisedAttention(nn.Module):
    """q (kᵀ v) + q * f(v): the products of all pairs of a head's channels lie in two neurons of one space (CoaT)."""

    def __init__(self, heads=3, size=4, width=6):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, 2)
        self.scale = nn.Parameter(torch.randn(heads * size))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        product = k.softmax(2).transpose(-1, -2) @ v
        local = q * (v.transpose(1, 2).flatten(2) * self.scale).view(b, t, self.heads, self.size).transpose(1, 2)
        return self.out((q @ product + local).transpose(1, 2).flatten(2))


def test_pairs_of_channels_of_one_head():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    graph = sound(FactorisedAttention, (x,))
    inner = only(graph, "scale", 0)
    assert (inner.size, inner.blocks, inner.members) == (12, 3, 4)
    assert graph.by_id[inner.parents[0]].size == 3


class ChannelsAsPlaces(nn.Module):
    """A kernel of one place over a dimension that holds channels (CoaT's mean of class tokens)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Conv1d(2, 1, 1), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.mix(torch.stack([self.a(x), self.b(x)], 1)).squeeze(1).tanh())


def test_a_kernel_of_one_place_leaves_places_alone():
    graph = sound(ChannelsAsPlaces, ROWS)
    (space,) = graph.spaces
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 0) is only(graph, "out.weight", 1) is space


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embed, self.cells = nn.Linear(6, 5), kind(5, 4, **options)
        self.out = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.out(self.cells(F.relu(self.embed(x)))[0])


def test_lstm_and_gru_in_every_shape():
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    for kind in (nn.LSTM, nn.GRU):
        for options in ({}, {"bidirectional": True}, {"num_layers": 2}, {"batch_first": True, "bias": False}):
            # in float32 the kernel for all steps is used, in float64 one operation after the other
            single = traced(Recurrent(kind, **options).eval(), (x,))
            assert single.unknown_ops == {}
            graph = sound(lambda kind=kind, options=options: Recurrent(kind, **options), (x,))
            assert [(s.label, s.group) for s in single.spaces] == [(s.label, s.group) for s in graph.spaces]
            assert only(graph, "cells.weight_hh_l0", 0) is only(graph, "cells.weight_hh_l0", 1)
            assert only(graph, "embed.weight", 0).size == 5
