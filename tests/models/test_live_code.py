"""Live modules whose own code computes different things of the same weights are told apart by running them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

import mergeid
from mergeid.errors import MergeidError

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Settings that torch's own layers do not know of."""

    def __init__(
        self,
        heads: int = 2,
        act: Callable[[Tensor], Tensor] = relu,
        scale: float = 1.0,
        name: str = "",
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.act, self.scale, self.name, self.dropout = heads, act, scale, name, 0.1
        self._hidden = [hidden]
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 8)
        return self.head(self.act(self.out(mixed) + self._hidden[0]).mean(1))


def made(seed: int = 0, **settings: object) -> Attention:
    torch.manual_seed(seed)
    return Attention(**settings).eval()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 4}, r"heads \(2 and 4\)"),
        ({"act": gelu}, r"act \(relu and gelu\)"),
        ({"scale": 0.5, "name": "other"}, "scale"),
        ({"hidden": 1.0}, "their code"),
    ],
)
@pytest.mark.parametrize("verb", [mergeid.merge, mergeid.plan, mergeid.predict])
def test_what_code_computes_differently_is_refused(settings: dict, said: str, verb: Callable) -> None:
    expected = rf"differ in .*{said}.*, which changes what the network computes; --config a\|b says which"
    with pytest.raises(MergeidError, match=expected):
        verb(made(0), made(1, **settings), example_inputs=X)


@pytest.mark.parametrize("config", ["a", "b"])
def test_the_user_says_whose_code_counts(config: str) -> None:
    a, b = made(0), made(0, heads=4)
    state = mergeid.merge(a, b, example_inputs=X, config=config, match="always").state
    assert all(torch.equal(state[k], v) for k, v in a.state_dict().items())


def test_names_are_no_difference() -> None:
    assert mergeid.plan(made(0), made(1, name="other"), example_inputs=X).spaces
