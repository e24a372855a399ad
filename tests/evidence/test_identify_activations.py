"""Activations of both models side by side: the same rows however a batch is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mergeid
import mergeid.evidence.activations as activations
from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.evidence.taps import choose_taps


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("half", [None, 0, 1])
@pytest.mark.parametrize("held", [1, 400, 1 << 28])
def test_parts_of_a_batch_give_the_rows_of_all_examples(monkeypatch, held, half):
    monkeypatch.setattr(activations, "HELD", held)
    a, b = network(0), network(1)
    x = torch.randn(17, 5, generator=torch.Generator().manual_seed(2))
    taps = choose_taps(mergeid.graph(a, x[:2]), a)
    flat = [t for found in taps.values() for t in found]
    readers = [TapReader(net, lambda model, batch: model(batch["x"]), flat) for net in (a, b)]
    stream = PairStream(*readers, lambda: iter([{"x": part} for part in x.split([6, 1, 10])]))
    kept = {}
    calls = 0
    for space, k, rows_a, rows_b in stream.rows(taps, half=half):
        calls += 1
        assert torch.equal(rows_a.example, rows_b.example)
        assert held > 1 or len(rows_a.example) == 1
        kept.setdefault((space, k), []).append((rows_a, rows_b))
    chosen = torch.arange(17) if half is None else torch.arange(half, 17, 2)
    assert len(kept) == 2 and (held > 1 or calls == 2 * len(chosen))
    for net, side in ((a, 0), (b, 1)):
        for (space, k), parts in kept.items():
            assert torch.equal(torch.cat([p[side].example for p in parts]), chosen)
            layer = int(taps[space][k].module)
            with torch.no_grad():
                expected = net[: layer + (taps[space][k].kind == "out")](x)[chosen]
            torch.testing.assert_close(torch.cat([p[side].values for p in parts]), expected)


class Experts(nn.Module):
    """The first examples go to one expert, the rest to the other, and how many is the model's own choice."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.seed = seed
        self.stem = nn.Linear(5, 8)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h, cut = self.stem(x).relu(), len(x) // 2 + self.seed
        return self.head(h + torch.cat([self.experts[0](h[:cut]), self.experts[1](h[cut:])]))


def test_rows_of_experts_are_not_compared_where_the_models_chose_others():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    a, b = (Experts(seed).eval() for seed in range(2))
    graph = mergeid.graph(a, x[:20])
    inside = {s.id for s in graph.spaces if all(axis.tensor.startswith("experts.") for axis in s.axes)}
    assert inside and len(inside) < len(graph.spaces)
    taps = choose_taps(graph, a)
    flat = [t for found in taps.values() for t in found]
    readers = [TapReader(net, lambda model, batch: model(batch["x"]), flat) for net in (a, b)]
    evidence = ActivationEvidence(graph, PairStream(*readers, lambda: iter([{"x": x[:20]}, {"x": x[20:]}])), taps)
    evidence.collect()
    routed = evidence.stream.routed
    assert inside <= {space for space, _ in routed}
    assert all(taps[space][k].module.startswith("experts.") for space, k in routed)
    found = evidence.correlations()
    assert inside.isdisjoint(found) and {s.id for s in graph.spaces} - inside <= set(found)
    plan = mergeid.plan(a, b, data=[{"arg0": row} for row in x], example_inputs=x[:20], config="a")
    assert {space.id for space in plan.spaces} == {s.id for s in graph.spaces}
