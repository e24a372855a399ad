"""Live modules are as they were after every verb: what their passes leave behind is put back, and so is the RNG."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.basics.untouched import untouched


class Remembers(nn.Module):
    """Counts its passes, averages its activations, keeps its last ones, and draws noise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None
        self.seen: list[int] = []
        self.by_size: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        self.calls += 1
        self.average = self.average.lerp(h.mean(0).detach(), 0.1)
        self.last, self.new = h.detach(), True
        self.seen.append(len(x))
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        return self.b(h + 0 * torch.rand(()))


def state(net: Remembers) -> list[Any]:
    return [net.average.clone(), net.calls.clone(), net.last, list(net.seen), dict(net.by_size), hasattr(net, "new")]


DATA = [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(torch.randn(40, 6))]
X = {"x": torch.randn(2, 6)}
VERBS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "graph": lambda a, b: mergeid.graph(a, example_inputs=X),
    "plan": lambda a, b: mergeid.plan(a, b, data=DATA, example_inputs=X),
    "merge": lambda a, b: mergeid.merge([a], b, data=DATA, example_inputs=X, force=True),
    "barrier": lambda a, b: mergeid.barrier(a, b, data=DATA, example_inputs=X, points=3),
    "predict": lambda a, b: mergeid.predict(a, b, data=DATA, example_inputs=X),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_nothing_is_left_behind(verb: str) -> None:
    nets = [Remembers(0).eval(), Remembers(1)]
    nets[0](torch.randn(5, 6))
    before, weights = [state(n) for n in nets], [copy.deepcopy(list(n.parameters())) for n in nets]
    buffers, generator = [n.average for n in nets], torch.get_rng_state()
    VERBS[verb](*nets)
    assert torch.equal(torch.get_rng_state(), generator)
    for net, was, mine, buffer in zip(nets, before, weights, buffers, strict=True):
        assert net.average is buffer and net.training == (net is nets[1])
        for new, old in zip(state(net), was, strict=True):
            assert torch.equal(new, old) if isinstance(old, Tensor) else new == old
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), mine, strict=True))


def test_after_an_error_too() -> None:
    net = Remembers(0)
    with pytest.raises(ZeroDivisionError), untouched([vars(m) for m in net.modules()]):
        net(torch.randn(3, 6))
        _ = 1 / 0
    assert net.calls == 0 and net.last is None and not net.seen


def left_transposed(net: nn.Module, x: Tensor) -> Tensor:
    return x @ net.a.weight.t_() + net.a.bias


def given_other_memory(net: nn.Module, x: Tensor) -> Tensor:
    net.a.weight.data = net.a.weight.t().contiguous()
    return x @ net.a.weight + net.a.bias


def left_longer(net: nn.Module, x: Tensor) -> Tensor:
    return x @ net.a.weight.t() + net.a.bias.unsqueeze_(0)


@pytest.mark.parametrize("first", [left_transposed, given_other_memory, left_longer])
def test_parameters_keep_their_shapes(first: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Merges ended in "tensor 'a.weight' has shape [6, 8] in Net and [8, 6] in Net"."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(first(self, x)))

    torch.manual_seed(0)
    a = Net().eval()
    b, order = copy.deepcopy(a), torch.randperm(8)
    shuffled = {"a.weight": a.a.weight[order], "a.bias": a.a.bias[order], "b.weight": a.b.weight[:, order]}
    b.load_state_dict({**a.state_dict(), **shuffled})
    b.a.bias.data += 1e-3  # no copy, whose order could be read off the weights
    merged = mergeid.merge(a, b, data=DATA, example_inputs=X).state
    assert all(torch.allclose(merged[k], v, atol=2e-3) for k, v in a.state_dict().items())
    assert a.a.weight.shape == (8, 6) and a.a.bias.shape == (8,) and torch.equal(b.a.weight, shuffled["a.weight"])
