"""Networks whose weights lie on no layer (raw parameters, complex ones): a copy in another order is brought back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mergeid
from mergeid import MergeidError

N = 8


class Raw(nn.Module):
    """Matrices that the module multiplies with itself: no layer's activations can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(n, m)) for n, m in ((N, 6), (N, N), (3, N)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.a.T) @ self.b.T) @ self.c.T


class Mixed(nn.Module):
    """A layer before them."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.raw = nn.Linear(6, 6), Raw()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.raw(self.front(x).relu())
        return out


class Fourier(nn.Module):
    """A complex weight on the low frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, N), nn.Linear(N, 3)
        self.w = nn.Parameter(torch.randn(N, N, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.a(x[..., None]).transpose(1, 2))
        low = torch.einsum("bim,iom->bom", spectrum[..., :3], self.w)
        return self.b(F.gelu(torch.fft.irfft(low, n=x.shape[-1])).mean(-1))


class Imaginary(nn.Module):
    """What tells its neurons apart is the imaginary part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = (nn.Parameter(1j * torch.randn(n, m)) for n, m in ((N, 6), (3, N)))
        self.b = nn.Linear(N, N, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x.to(self.a.dtype) @ self.a.T)
        return (torch.tanh(self.b(h)) @ self.c.T).imag


NETWORKS: dict[str, Callable[[], nn.Module]] = {c.__name__: c for c in (Raw, Mixed, Fourier, Imaginary)}
ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
DATA: list[dict[str, Any]] = [{"arg0": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ROWS)]
INPUTS = {"example_inputs": ROWS[:4]}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().eval()


def scrambled(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy in another order, and how many spaces it was given."""
    graph = mergeid.graph(model, ROWS[:4])
    found, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    found.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(3)), state))
    torch.testing.assert_close(found(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(v, state[k]) for k, v in found.state_dict().items())
    return found, len(graph.spaces)


HOW: dict[str, dict[str, Any]] = {
    "weights, auto": {},
    "weights, always": {"match": "always"},
    "data, auto": {"data": DATA},
    "data, always": {"match": "always", "data": DATA},
    "ot": {"match": "always", "matcher": "ot"},
    "sinkhorn": {"match": "always", "matcher": "sinkhorn"},
    "layerwise": {"match": "always", "matcher": "layerwise"},
    "cycle": {"match": "always", "matcher": "cycle"},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_in_another_order_is_brought_back(name: str, how: str) -> None:
    a = network(name)
    b, spaces = scrambled(a)
    assert spaces >= 2
    found = mergeid.align(b, a, **INPUTS, **HOW[how]).state
    for key, value in a.state_dict().items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", NETWORKS)
def test_its_merge_is_the_network(name: str) -> None:
    a = network(name)
    merged = mergeid.merge(a, scrambled(a)[0], **INPUTS, data=DATA, force=True)
    a_again = network(name)
    a_again.load_state_dict(merged.state)
    torch.testing.assert_close(a_again(ROWS), a(ROWS), rtol=1e-3, atol=1e-4)
    assert all(merged.state[k].dtype == v.dtype for k, v in a.state_dict().items())


@pytest.mark.parametrize("name", ["Fourier", "Imaginary"])
def test_verbs_on_complex_weights(name: str) -> None:
    a, b, base = (network(name, seed) for seed in range(3))
    assert mergeid.plan(a, b, **INPUTS, data=DATA, base=base).spaces
    assert mergeid.predict(a, b, **INPUTS, data=DATA)
    moved = mergeid.merge(a, b, **INPUTS, data=DATA, transport=True, force=True)
    assert moved.state.keys() == a.state_dict().keys()
    with pytest.raises(MergeidError, match="trains real weights, and these models have complex ones"):
        mergeid.align(b, a, **INPUTS, data=DATA, match="always", matcher="straight_through")


def test_independent_networks_are_not_forced_together() -> None:
    """Where weights gain nothing, nothing moves."""
    a, b = network("Raw"), network("Raw")
    assert mergeid.plan(a, b, **INPUTS, data=DATA).verdict == "direct"
