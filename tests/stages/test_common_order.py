"""More than two models in one order: what a joint matcher is given, and what comes of its answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import mergeid
from mergeid.matchers import protocol
from mergeid.matchers.protocol import MatchTask
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
SIZE = 6


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), nn.Linear(SIZE, 3)).eval()


class Told:
    """A joint matcher that keeps what it is given."""

    name, needs = "told", "weights"

    def __init__(self, universe: Sequence[np.ndarray]) -> None:
        self.universe, self.given = universe, {}

    def match(self, task: MatchTask) -> Element:
        return task.graph.identity()

    def match_all(
        self,
        graph: NeuronGraph,
        states: Sequence[Mapping[str, Tensor]],
        generator: Generator,
        correlations: Mapping[tuple[int, int], Mapping[str, np.ndarray]] | None = None,
        judge: Callable[[Sequence[Element]], float] | None = None,
    ) -> list[Element]:
        space = graph.spaces[0].id
        found = [{space: order} for order in self.universe]
        self.given = {
            "states": list(states), "correlations": correlations, "space": space,
            "judged": None if judge is None else [judge(found), judge([graph.identity()] * len(found))],
        }  # fmt: skip
        return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    random = np.random.default_rng(1)
    found = Told([random.permutation(SIZE) for _ in range(3)])
    monkeypatch.setitem(protocol._registered, found.name, found)
    return found


@pytest.mark.parametrize("with_data", [True, False])
def test_a_joint_matcher_gets_all_evidence_and_its_universe_is_applied(told: Told, with_data: bool) -> None:
    nets = [net(seed) for seed in range(3)]
    how: dict[str, Any] = {"data": [{"arg0": row} for row in X]} if with_data else {}
    result = mergeid.merge(
        *nets, matcher="told", match="always", repair="none", example_inputs=X[:2], force=True, **how
    )
    for given, one in zip(told.given["states"], nets, strict=True):
        assert all(torch.equal(given[k], v) for k, v in one.state_dict().items())
    moved = []
    for order, one in zip(told.universe, nets, strict=True):  # into the common order, by hand
        state = dict(one.state_dict())
        moved.append({"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order],
                      "2.weight": state["2.weight"][:, order], "2.bias": state["2.bias"]})  # fmt: skip
    average = {k: torch.stack([m[k] for m in moved]).mean(0) for k in moved[0]}
    back = np.argsort(told.universe[0])  # the result lies in the first model's order
    wanted = {"0.weight": average["0.weight"][back], "2.weight": average["2.weight"][:, back]}
    for name, value in wanted.items():
        torch.testing.assert_close(result.state[name], value)
    if not with_data:
        assert told.given["correlations"] is None and told.given["judged"] is None
        return
    assert set(told.given["correlations"]) == set(itertools.combinations(range(3), 2))
    with torch.no_grad():
        hidden = [one[:2](X[::2]).double().numpy() for one in nets]
        whole = nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), nn.Linear(SIZE, 3))
        whole.load_state_dict(average)
        plain = nn.Sequential(nn.Linear(4, SIZE), nn.Tanh(), nn.Linear(SIZE, 3))
        plain.load_state_dict({k: torch.stack([n.state_dict()[k] for n in nets]).mean(0) for k in average})
        said = [n(X).double() for n in nets]
        spread = [float((w(X).double() - sum(said) / 3).square().mean()) for w in (whole, plain)]
    for (p, q), found in told.given["correlations"].items():
        rho = np.corrcoef(hidden[p].T, hidden[q].T)[:SIZE, SIZE:]
        np.testing.assert_allclose(found[told.given["space"]], rho, atol=1e-5)
    first, second = told.given["judged"]
    assert (first < second) == (spread[0] < spread[1])


def test_pairs_are_matched_one_by_one_where_a_matcher_knows_only_pairs() -> None:
    nets = [net(seed) for seed in range(3)]
    result = mergeid.merge(*nets, matcher="weight", match="always", example_inputs=X[:2], force=True)
    for other, plan in zip(nets[1:], result.plans, strict=True):
        alone = mergeid.plan(nets[0], other, matcher="weight", match="always", example_inputs=X[:2])
        assert all((alone.element[k] == v).all() for k, v in plan.element.items())
