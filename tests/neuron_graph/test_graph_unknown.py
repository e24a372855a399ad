"""What the tracer does not know it freezes, and equal sizes confuse nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import on, only, seeded, sound, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.neuron_graph import rules

ROWS = (torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),)


class Side(nn.Module):
    """An operation on one hidden layer, while another layer goes its own way."""

    def __init__(self, op):
        super().__init__()
        self.a, self.b, self.c, self.d, self.op = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(6, 7), nn.Linear(7, 2), op

    def forward(self, x):
        return self.b(self.op(self.a(x))) + self.d(self.c(x).tanh())


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda x: x * torch.linalg.qr(x.T)[1][0, 0], "aten.linalg_qr"),
        (lambda x: x * torch.linalg.cholesky(x.T @ x + torch.eye(8).to(x))[0, 0], "aten.linalg_cholesky_ex"),
        (lambda x: x * torch.histc(x, 4)[1], "aten.histc"),
    ],
)
def test_an_unknown_operation_freezes_what_it_touches(op, name):
    graph = sound(lambda: Side(op), ROWS)
    assert name in graph.unknown_ops
    why = {(t, a): w for t, a, w in graph.frozen}
    assert "no rule for aten." in why["a.weight", 0] and "no rule for aten." in why["a.bias", 0]
    assert ("b.weight", 1) in why
    (space,) = graph.spaces
    assert space is only(graph, "c.weight", 0) and space.size == 7


@pytest.mark.parametrize(
    "name", ["aten.silu", "aten.mul", "aten.view", "aten.cat", "aten.native_layer_norm", "aten.sum"]
)
def test_without_its_rule_a_common_operation_freezes_too(name, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.norm(F.silu(self.a(x)))
            x = torch.cat([x * x.sum(-1, keepdim=True).tanh(), x.view(-1, 2, 4).mean(1)], -1)
            return self.c(self.b(x).tanh())

    known = sound(Net, ROWS)
    assert known.unknown_ops == {} and {s.size for s in on(known, "a.weight", 0)} <= {4, 8}
    found = rules.rule_for
    monkeypatch.setattr(
        "mergeid.neuron_graph.recorder.rule_for", lambda f: None if str(f.overloadpacket) == name else found(f)
    )
    graph = sound(Net, ROWS)
    assert list(graph.unknown_ops) == [name]
    assert graph.share < known.share
    assert any(f"no rule for {name}" in w for _, _, w in graph.frozen)
    assert only(graph, "c.weight", 1).size == 5


def test_a_rule_that_is_taken_away(monkeypatch):
    monkeypatch.delitem(rules._RULES, "aten.native_layer_norm")
    graph = sound(lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)), ROWS)
    assert graph.spaces == [] and list(graph.unknown_ops) == ["aten.native_layer_norm"]
    assert graph.unknown_ops["aten.native_layer_norm"] == "1"


def test_a_second_rule_for_an_operation_is_refused():
    with pytest.raises(ValueError, match=r"aten\.mm has a rule already"):
        rules.rule("mm")(lambda call: None)


def test_unknown_custom_operation():
    @torch.library.custom_op("mergeid_tests::mirror", mutates_args=())
    def mirror(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1) * torch.arange(x.shape[-1])

    graph = sound(lambda: Side(lambda x: mirror(x)), ROWS)
    assert list(graph.unknown_ops) == ["mergeid_tests.mirror"]
    assert not on(graph, "a.weight", 0) and only(graph, "c.weight", 0).size == 7


class Everything(nn.Module):
    """A small transformer with a convolution, every size of its own choice."""

    def __init__(self, *, image, channels, stream, heads, size, hidden, experts, classes):
        super().__init__()
        self.heads, self.size = heads, size
        self.stem, self.norm = nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)
        self.embed = nn.Conv2d(channels, stream, 2, stride=2)
        self.place = nn.Parameter(torch.randn(image * image // 4, stream))
        self.qkv, self.proj = nn.Linear(stream, 3 * heads * size), nn.Linear(heads * size, stream)
        self.up, self.down, self.ln = nn.Linear(stream, hidden), nn.Linear(hidden, stream), nn.LayerNorm(stream)
        self.gate, self.mix = nn.Linear(stream, experts), nn.Parameter(torch.randn(experts, stream, classes))

    def forward(self, x):
        x = self.embed(self.norm(self.stem(x)).relu()).flatten(2).transpose(1, 2) + self.place
        b, t, _ = x.shape
        q, k, v = self.qkv(self.ln(x)).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(self.up(x).relu())
        return torch.einsum("btc,bte,ecn->bn", x, self.gate(x).softmax(-1), self.mix)


def structure(batch, **sizes):
    """Per space: where it lives and what it lies in, without any number."""
    picture = torch.randn(batch, 3, sizes["image"], sizes["image"], generator=torch.Generator().manual_seed(0))
    graph = sound(lambda: Everything(**sizes), (picture,))
    lives = {s.id: tuple(sorted({(a.tensor, a.axis) for a in s.axes})) for s in graph.spaces}
    return sorted((lives[s.id], sorted(lives[p] for p in s.parents)) for s in graph.spaces)


DISTINCT = {"image": 6, "channels": 5, "stream": 7, "heads": 3, "size": 4, "hidden": 8, "experts": 6, "classes": 2}


def test_equal_sizes_give_the_structure_of_distinct_sizes():
    expected = structure(10, **DISTINCT)
    assert len(expected) == 7  # channels, stream, heads, queries and keys, values, hidden, experts
    assert structure(4, **dict.fromkeys(DISTINCT, 4)) == expected


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({k: st.sampled_from([2, 4]) for k in DISTINCT}), st.integers(1, 4))
def test_no_coincidence_of_sizes_changes_the_structure(sizes, batch):
    assert structure(batch, **sizes) == structure(10, **DISTINCT)


def test_a_batch_of_one_says_the_same():
    model = seeded(lambda: Everything(**DISTINCT))
    graphs = []
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6, dtype=torch.float64)
        graphs.append([(s.size, s.blocks, s.parents) for s in traced(model, (x,)).spaces])
    assert graphs[0] == graphs[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_in_a_sentence(layout):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            rows = torch.nested.as_nested_tensor([r[None] for r in self.a(x)], layout=layout)
            return self.b(torch.nested.to_padded_tensor(rows, 0.0))

    with pytest.raises(
        MergeidError, match="works on nested tensors, whose neurons cannot be followed; set the model up"
    ):
        mergeid.graph(Nested(), ROWS)
