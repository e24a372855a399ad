"""A norm is solved alike, in whichever operations a device does it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergeid.repair.solve import solve_network

WIDTH = 6


class Net(nn.Module):
    """A linear layer behind an RMSNorm, which is one operation on GPUs, and several elsewhere."""

    def __init__(self, seed: int, fused: bool, *, epsilon: float | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.RMSNorm(WIDTH, eps=epsilon)
        self.head = nn.Linear(WIDTH, 4)
        self.fused = fused
        with torch.no_grad():
            self.norm.weight.add_(0.5 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not self.fused:
            return self.head(norm(x))
        return self.head(torch.ops.aten._fused_rms_norm.default(x, [WIDTH], norm.weight, norm.eps)[0])


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="this torch has no such operation")
@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_a_fused_rms_norm(epsilon: float | None) -> None:
    x = torch.randn(32, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    solved = []
    for fused in (False, True):
        models = [Net(seed, fused, epsilon=epsilon) for seed in (1, 2)]
        merged = Net(3, fused, epsilon=epsilon)
        done = solve_network(merged, models, [0.5, 0.5], lambda net, b: net(b["x"]), [{"x": x}])
        solved.append((merged.state_dict(), [layer.weights for layer in done]))
    (plain, names), (fused_state, fused_names) = solved
    assert names == fused_names == [("norm.weight",), ("head.bias", "head.weight")]
    assert not torch.equal(plain["norm.weight"], Net(3, False, epsilon=epsilon).norm.weight)
    for key, value in plain.items():
        torch.testing.assert_close(fused_state[key], value, rtol=1e-5, atol=1e-6)
