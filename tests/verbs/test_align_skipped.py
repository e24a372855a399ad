"""What --skip leaves out of the match still goes along with its neurons: an aligned model is the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid import MergeidError


def _net(seed: int, classes: int = 3, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, classes)).eval()


def _scrambled(net: nn.Module, x: Tensor) -> nn.Module:
    graph = mergeid.graph(net, example_inputs=x[:2])
    moved = copy.deepcopy(net)
    moved.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), net.state_dict()))
    return moved


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("skip", [["4.*"], ["4.weight"], ["2.*", "4.*"]])
@pytest.mark.parametrize("given", [False, True])
def test_an_aligned_model_is_the_same_function(classes: int, skip: list[str], given: bool) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    a, b = _net(0), _scrambled(_net(0, classes), x)
    if classes == 5 and "4.*" not in skip:
        skip = [*skip, "4.bias"]
    data = list(x) if given else None
    found = mergeid.align(b, to=a, data=data, skip=skip, match="always", example_inputs=x[:2])
    aligned = copy.deepcopy(b)
    aligned.load_state_dict(found.state)
    with torch.no_grad():
        torch.testing.assert_close(aligned(x), b(x))
    assert any(bool((aligned.state_dict()[k] != b.state_dict()[k]).any()) for k in ("0.weight", "4.weight"))
    torch.testing.assert_close(aligned.state_dict()["0.weight"], a.state_dict()["0.weight"])


def test_a_skipped_layer_of_another_width_cannot_follow() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    class Two(nn.Module):
        def __init__(self, more: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16 + more, 3)
            self.more = more

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x).relu()
            return self.head(torch.cat([hidden, x[:, : self.more]], 1))

    with pytest.raises(MergeidError, match=r"'head.weight'.*use two models of one width"):
        mergeid.align(Two(2), to=Two(0), skip=["head.*"], match="always", example_inputs=x[:2])
