"""What a common order is judged by, beside an average that is made and run by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.request.request import Run
from mergeid.stages.judge import judge_of
from mergeid.verbs.load import load

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.two(self.norm(self.one(x)).relu())
        return said


def estimated(net: Net) -> Net:
    """With the statistics of its own pre-activations."""
    hidden = net.one(X)
    net.norm.load_state_dict(
        {**net.norm.state_dict(), "running_mean": hidden.mean(0), "running_var": hidden.var(0, correction=0)}
    )
    return net


def network(seed: int) -> Net:
    torch.manual_seed(seed)
    with torch.no_grad():
        net = estimated(Net().eval())
    net.norm.load_state_dict({**net.norm.state_dict(), "num_batches_tracked": torch.tensor(seed)})
    return net


def judged(nets: Sequence[nn.Module], universe: Sequence[Element], graph: NeuronGraph) -> float:
    models: list[Loaded] = [load(net, example_inputs=X[:2]) for net in nets]
    return judge_of(graph, models, Examples([{"arg0": row} for row in X]), Run(batch_size=40))(universe)


def by_hand(nets: Sequence[Net], universe: Sequence[Element], graph: NeuronGraph) -> float:
    """Squared distance of the average's answers from the models' mean answer, over the variance of that."""
    states = [graph.apply_state(e, net.state_dict()) for e, net in zip(universe, nets, strict=True)]
    average = copy.deepcopy(nets[0])
    mean = {k: torch.stack([s[k] for s in states]).double().mean(0) for k in states[0]}
    with torch.no_grad():
        for name, value in average.named_parameters():
            value.copy_(mean[name])
        said: Tensor = estimated(average)(X).double()
        wanted = torch.stack([net(X).double() for net in nets]).mean(0)
    return float((said - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


@pytest.mark.parametrize("count", [2, 3])
def test_an_order_is_judged_by_the_average_that_it_makes(count: int) -> None:
    nets = [network(k) for k in range(count)]
    graph = mergeid.graph(nets[0], X[:2])
    generator = torch.Generator().manual_seed(1)
    for universe in ([graph.identity()] * count, [graph.random_element(generator) for _ in range(count)]):
        assert judged(nets, universe, graph) == pytest.approx(by_hand(nets, universe, graph), rel=1e-4)
    assert [int(net.state_dict()["norm.num_batches_tracked"]) for net in nets] == list(
        range(count)
    )  # they are left alone


def test_the_order_that_brings_copies_together_is_perfect() -> None:
    net, other = network(0), network(0)
    graph = mergeid.graph(net, X[:2])
    element = graph.random_element(torch.Generator().manual_seed(2))
    other.load_state_dict(graph.apply_state(element, net.state_dict()))
    back = {k: np.argsort(p) for k, p in element.items()}
    assert judged([net, other], [graph.identity(), back], graph) == pytest.approx(0, abs=1e-9)
    assert judged([net, other], [graph.identity(), graph.identity()], graph) > 0.01
