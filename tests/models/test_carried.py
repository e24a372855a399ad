"""Modules that hold functions which refer to their own layers: copies call the copies' layers."""

from __future__ import annotations

import copy
from functools import partial
from threading import Lock
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.models.carried import copyable


class Held(nn.Module):
    """Its layers are reached through functions that lie on it."""

    def __init__(self, seed: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        a = self.a
        ways: dict[str, Any] = {
            "self": lambda x: self.a(x).relu(),
            "layer": lambda x: a(x).relu(),
            "default": lambda x, layer=a: layer(x).relu(),
            "keyword": lambda x, *, layer=a: layer(x).relu(),
            "weight": lambda x, w=a.weight: (x @ w.T + self.a.bias).relu(),
            "nested": lambda x: ways["layer"](x),
            "inside": lambda x, layers=(a, [a]): layers[1][0](x).relu(),
            "partial": partial(lambda layer, x: layer(x).relu(), a),
            "partial of a function": partial(lambda f, x: f(x), lambda x: a(x).relu()),
            "method of a layer": (lambda method: lambda x: method(x).relu())(a.forward),
            "method": MethodType(lambda net, x: a(x).relu(), self),
            "hook": nn.Identity(),
            "forward": nn.Identity(),
        }
        self.f: Any = ways.get(how)
        if how == "hook":
            self.f.register_forward_hook(lambda module, args, out: a(args[0]).relu())
        if how == "forward":
            old = a.forward
            a.forward = lambda x: old(x).relu()  # type: ignore[method-assign]
            self.f = None
        if how == "list":
            self.f = [ways["self"]]
        if how == "dict":
            self.f = {"first": ways["self"]}

    def forward(self, x: Tensor) -> Tensor:
        first = self.f[0] if isinstance(self.f, list) else self.f["first"] if isinstance(self.f, dict) else self.f
        return self.b(self.a(x) if first is None else first(x))


WAYS = (
    *("self", "layer", "default", "keyword", "weight", "list", "dict", "nested", "inside", "partial"),
    *("partial of a function", "method of a layer", "method", "hook", "forward"),
)


@pytest.mark.parametrize("how", WAYS)
def test_a_merge_with_a_permuted_copy_gives_the_model_back(how: str) -> None:
    """As for the same network written with plain methods; the modules given are left as they were."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    net = Held(0, how).eval()
    before = net(x).detach()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    other = Held(0, how).eval()
    other.load_state_dict({
        "a.weight": net.a.weight[order], "a.bias": net.a.bias[order],
        "b.weight": net.b.weight[:, order], "b.bias": net.b.bias,
    })  # fmt: skip
    assert len(mergeid.graph(net, example_inputs=x[:2]).spaces) == 1
    result = mergeid.merge(net, other, data=list(x), example_inputs=x[:2])
    assert result.verdict == "match"
    merged = Held(3, how).eval()
    merged.load_state_dict(result.state)
    torch.testing.assert_close(merged(x), before)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_a_function_that_calls_itself_is_copied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = layer = nn.Linear(4, 4)

            def again(x: Tensor, times: int) -> Tensor:
                return x if times == 0 else again(layer(x), times - 1)

            self.f = again

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x, 2)

    net, x = copyable(Twice()), torch.randn(3, 4)
    twin, before = copy.deepcopy(net), net(x).detach()
    with torch.no_grad():
        twin.a.weight.zero_()
        twin.a.bias.fill_(2.0)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), torch.full((3, 4), 2.0))


def test_copies_are_independent_and_plain_modules_stay_themselves() -> None:
    net = copyable(Held(0, "self"))
    twin = copy.deepcopy(net)
    x = torch.ones(1, 6)
    before = net(x).detach()
    with torch.no_grad():
        twin.a.weight.zero_()
        twin.a.bias.zero_()
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    torch.testing.assert_close(twin(x), twin.b.bias[None])
    plain = nn.Sequential(nn.Linear(2, 2))
    assert copyable(plain) is plain


def test_a_module_that_also_holds_what_its_last_pass_computed() -> None:
    """Such a module is copied, for its tensors cannot be: its functions have to go along there, too."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    nets = []
    for _ in range(2):
        net = Held(0, "self").eval()
        net.last = net(x)
        nets.append(net)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    a, b = nets[1].a, nets[1].b
    with torch.no_grad():
        a.weight.copy_(a.weight[order])
        a.bias.copy_(a.bias[order])
        b.weight.copy_(b.weight[:, order])
    result = mergeid.merge(*nets, data=list(x), example_inputs=x[:2])
    merged = Held(3, "self").eval()
    merged.load_state_dict(result.state)
    torch.testing.assert_close(merged(x), nets[0](x))
    assert all(net.last.grad_fn is not None for net in nets)


class Holds(nn.Module):
    """Something that Python does not copy, on a layer of it."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
        self.body.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(("make", "kind"), [(Lock, "lock"), (lambda: (k for k in range(3)), "generator")])
def test_what_cannot_be_copied_is_named(make: Any, kind: str) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    expected = (
        rf"body.held of Holds \(of type {kind}\) cannot be copied \(cannot pickle .*\), and a graph is verified on"
    )
    with pytest.raises(MergeidError, match=expected):
        mergeid.graph(Holds(make()), x)
    with pytest.raises(MergeidError, match=expected):
        mergeid.merge(Holds(make()), Holds(make()), example_inputs=x, match="always")
    assert mergeid.graph(Holds([1, {"a": 2}]), x).spaces
