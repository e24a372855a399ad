"""Activations are read where position by position they are of the same thing in both models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.evidence.taps import choose_taps


class Pooled(nn.Module):
    """Nodes are pooled into clusters, whose order is a space of its own, and worked on there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.clusters, self.b, self.head = (nn.Linear(i, o) for i, o in ((8, 10), (8, 3), (10, 12), (12, 3)))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        shares = (edges @ self.clusters(x)).softmax(-1)
        pooled, between = shares.T @ (edges @ self.a(x)).relu(), shares.T @ edges @ shares
        return self.head((between @ self.b(pooled)).relu().mean(0, keepdim=True))


def graph(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 6, generator=generator)


def made(seed: int = 0) -> Pooled:
    torch.manual_seed(seed)
    return Pooled().eval()


DATA = [graph(k) for k in range(32)]


def test_not_where_positions_are_another_space() -> None:
    model = made()
    found = mergeid.graph(model, graph(0))
    sizes = {s.id: s.size for s in found.spaces}
    assert sorted(sizes.values()) == [3, 10, 12]
    read = {sizes[s]: {(t.module, t.kind) for t in taps} for s, taps in choose_taps(found, model).items()}
    assert ("b", "in") not in read[10] and ("b", "out") not in read[12]
    assert ("a", "out") in read[10] and ("head", "in") in read[12]


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_copy_in_another_order_merges_into_the_model(noise: float) -> None:
    """Read at the clusters, in whatever order B has them, no neurons correspond."""
    a, b = made(), made()
    found = mergeid.graph(a, graph(0))
    element = found.random_element(torch.Generator().manual_seed(5))
    assert (element[next(s.id for s in found.spaces if s.size == 3)] != range(3)).any()
    state = {k: v + noise * torch.randn_like(v) for k, v in found.apply_state(element, b.state_dict()).items()}
    b.load_state_dict(state)
    result = mergeid.merge(a, b, example_inputs=graph(0), data=DATA, repair=False)
    assert all(s.decision == "match" for s in result.plan.spaces)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(result.state[name], value, atol=5 * noise + 1e-7, rtol=0)


class Holes(nn.Module):
    """Some of its activations are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(torch.where(x[:, :1] > 1, torch.nan, h)).nan_to_num()


def test_what_is_no_number_is_left_out() -> None:
    a, b, x = Holes().eval(), Holes().eval(), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    x[:2, 0] = 0
    assert (x[:, 0] > 1).any()
    plan = mergeid.plan(a, b, example_inputs=x[:2], data=[(v,) for v in x])
    assert all(-1 <= s.j_match <= 1 for s in plan.spaces) and plan.spaces
    with pytest.raises(MergeidError, match="layer b takes or gives nothing but NaN or infinite numbers on the data"):
        mergeid.plan(a, b, example_inputs=x[:2], data=[(v + 9,) for v in x])
