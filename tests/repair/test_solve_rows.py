"""Which rows a layer is fitted on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mergeid.repair.solve import solve_network


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_count_as_padding(value: float) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval() for _ in range(2)]
    x = torch.randn(40, 5, 6)
    mask = (torch.rand(40, 5) < 0.7).long()
    mask[0] = 1
    spoilt = x.clone()
    spoilt[..., 2][mask == 0] = value
    states = []
    for batch in ({"x": x, "attention_mask": mask}, {"x": spoilt}):
        merged = copy.deepcopy(nets[0])
        done = solve_network(merged, nets, [0.5, 0.5], lambda net, given: net(given["x"]), [batch])
        assert len(done) == 3 and all(layer.after < layer.before for layer in done)
        states.append(merged.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected)
