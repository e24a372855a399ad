"""Verification on networks that magnify rounding errors: it neither refutes a right graph nor lets a wrong one pass."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from graph_helpers import TwoLayers, call, only, traced
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.neuron_graph.compare import Yardstick
from mergeid.neuron_graph.probe import randomised
from mergeid.neuron_graph.settle import own_statistics, shaken
from mergeid.neuron_graph.verify import verify

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return x + 4 * y * torch.sin(y)  # a large y makes its error larger still


class Chaotic(nn.Module):
    """Its statistics do not fit its activations, which grow from block to block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chaotic() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chaotic().eval(), torch.randn(8, 3)


def magnified(model: nn.Module, inputs: Tensor) -> float:
    """The relative change of the outputs when the weights change by a few rounding errors."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    move = shaken(torch.Generator().manual_seed(1), torch.float64)
    with torch.no_grad():
        before = model(inputs)
        model.load_state_dict({k: move(k, v) for k, v in state.items()})
        after = model(inputs)
    model.load_state_dict(state)
    return Yardstick({"": before}).error({"": after})


def test_its_own_statistics_calm_a_network():
    model, inputs = chaotic()
    model, inputs = model.double(), inputs.double()
    model.load_state_dict(randomised(model, torch.Generator().manual_seed(0)))
    assert magnified(model, inputs) > 1e-3
    with torch.no_grad(), own_statistics(model):
        model(inputs)
    assert magnified(model, inputs) < 1e-11


def test_a_chaotic_network_does_not_refute_its_graph():
    model, inputs = chaotic()
    graph = traced(model, (inputs,))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    found = verify(graph, model, (inputs,), call, generator=torch.Generator().manual_seed(0), samples=3)
    assert found.failed == () and found.error < 1e-9 and found.graph.spaces
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_where_float32_is_too_coarse_float64_decides():
    class Rough(nn.Module):
        """A rounding error of float32 is a large one of the angle."""

        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            return torch.sin(1e6 * self.head(y))

    model, inputs = Rough().eval(), (torch.randn(8, 3),)
    graph = traced(model, inputs)
    found = verify(graph, model, inputs, call, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    assert found.failed == () and found.graph.verified is not None and found.graph.verified["dtype"] == "float64"


def test_nor_does_it_hide_a_wrong_space():
    model, inputs = chaotic()
    graph = traced(model, (inputs,))
    (stream,) = graph.spaces
    # what blocks.5.norm scales is said to stand still while its neurons move
    wrong = replace(stream, axes=tuple(a for a in stream.axes if a.tensor != "blocks.5.norm.weight"))
    graph = replace(graph, spaces=[wrong])
    found = verify(graph, model, (inputs,), call, generator=torch.Generator().manual_seed(0))
    assert found.failed == (stream.id,) and not found.graph.spaces


def test_outputs_that_are_not_numbers_prove_nothing():
    class Masked(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(-1 - self.b(self.a(x)).square())

    model, inputs = Masked(3, WIDTH, 2).eval(), (torch.randn(4, 3),)
    graph = traced(model, inputs)
    with pytest.raises(MergeidError, match="the outputs of Masked on its example inputs are not numbers"):
        verify(graph, model, inputs, call, generator=torch.Generator().manual_seed(0))


class Pairs(nn.Module):
    """Every example's share of all examples: 1 for one by itself, whatever the weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.last(torch.relu(self.first(x))), dim=0)


def test_outputs_that_do_not_depend_on_the_weights_prove_nothing():
    model, inputs = Pairs().eval(), torch.randn(4, 3)
    graph = traced(model, (inputs,))
    assert graph.spaces
    blind = verify(graph, model, (inputs[:1],), call, generator=torch.Generator().manual_seed(0))
    assert not blind.graph.spaces
    assert {why for _, _, why in blind.graph.frozen if "depend" in why} == {
        "verification: the outputs compared do not depend on these weights"
    }
    seen = verify(graph, model, (inputs,), call, generator=torch.Generator().manual_seed(0))
    assert seen.failed == () and seen.graph.spaces
    # one example is tried first, then all
    found = mergeid.graph(model, inputs)
    assert found.spaces and found.verified is not None and found.verified["error_when_misapplied"] > 1e-3


def test_a_group_of_one_axis_has_no_wrong_application():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(3, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.only(x)).sum(-1)

    inputs = torch.randn(4, 3)
    found = mergeid.graph(One().eval(), inputs)
    assert [s.size for s in found.spaces] == [WIDTH]


def test_what_lies_behind_a_closed_gate_is_checked():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.last = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.stem(x)) + self.gate * torch.relu(self.branch(x)))

    model, inputs = Gated().eval(), (torch.randn(4, 3),)
    graph = traced(model, inputs)
    (stream,) = graph.spaces
    wrong = replace(stream, axes=tuple(a for a in stream.axes if not a.tensor.startswith("branch.")))
    found = verify(replace(graph, spaces=[wrong]), model, inputs, call, generator=torch.Generator().manual_seed(0))
    assert found.failed == (stream.id,)
    assert verify(graph, model, inputs, call, generator=torch.Generator().manual_seed(0)).failed == ()


def test_masked_logits_count_as_equal():
    class Masked(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).masked_fill(torch.arange(4) > 1, float("-inf"))

    model, inputs = Masked(3, WIDTH, 4).eval(), (torch.randn(4, 3),)
    found = verify(traced(model, inputs), model, inputs, call, generator=torch.Generator().manual_seed(0))
    assert found.failed == () and found.error < 1e-12 and len(found.graph.spaces) == 1
    one, none = torch.tensor([1.0, float("inf")]), torch.tensor([1.0, 2.0])
    assert Yardstick({"": one}).error({"": one}) == 0 and Yardstick({"": one}).error({"": none}) == float("inf")
    assert Yardstick({"": none}).error({"": one}) == float("inf")


class Forbidden(TwoLayers):
    """Logits of what is not allowed are a large finite number."""

    def __init__(self, fill: float):
        super().__init__(3, WIDTH, 4)
        self.c, self.d, self.fill = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4), fill

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x))) + 1e-3 * self.d(torch.tanh(self.c(x)))
        return y.masked_fill(torch.arange(4) > 2, self.fill)


@pytest.mark.parametrize("fill", [-1e4, -1e5, -1e9, -1e20])
def test_large_numbers_that_stay_hide_nothing(fill):
    torch.manual_seed(0)
    model, inputs = Forbidden(fill).eval(), (torch.randn(5, 3),)
    graph = traced(model, inputs)
    found = verify(graph, model, inputs, call, generator=torch.Generator().manual_seed(0))
    assert found.failed == () and found.error < 1e-12 and len(found.graph.spaces) == 2
    assert found.graph.verified is not None and found.graph.verified["error_when_misapplied"] > 1e-3
    small = only(graph, "c.weight", 0)
    wrong = replace(small, axes=tuple(a for a in small.axes if a.tensor != "d.weight"))
    graph = replace(graph, spaces=[wrong if s is small else s for s in graph.spaces])
    assert verify(graph, model, inputs, call, generator=torch.Generator().manual_seed(0)).failed == (small.id,)


class Fourier(nn.Module):
    """Mixes frequencies by complex weights, in front of two real layers with a space between them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 5, dtype=torch.cfloat))
        self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.irfft(torch.fft.rfft(x) @ self.mix, n=8)
        return self.leave(torch.relu(self.enter(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_complex_weights_stay_complex_in_a_check(dtype):
    torch.manual_seed(0)
    model, inputs = Fourier().eval(), (torch.randn(4, 8),)
    graph = traced(model, inputs)
    seen = []

    def forward(net, args):
        seen.append(net.mix.dtype)
        return net(*args)

    found = verify(graph, model, inputs, forward, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert set(seen) == {torch.complex128 if dtype == torch.float64 else torch.complex64}
    assert found.failed == () and [s.size for s in found.graph.spaces] == [WIDTH]
    assert found.error < (1e-12 if dtype == torch.float64 else 1e-5)
    assert model.mix.dtype == torch.complex64


def test_complex_inputs_are_checked_in_the_same_precision():
    torch.manual_seed(0)
    layer = nn.Linear(4, WIDTH, dtype=torch.cfloat), nn.Linear(2 * WIDTH, 3)

    class Spectra(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = layer

        def forward(self, x):
            y = self.enter(x)
            return self.leave(torch.cat([y.real, y.imag], -1))

    model, inputs = Spectra().eval(), (torch.randn(4, 4, dtype=torch.cfloat),)
    seen = []

    def forward(net, args):
        seen.append(args[0].dtype)
        return net(*args)

    verify(traced(model, inputs), model, inputs, forward, generator=torch.Generator().manual_seed(0))
    assert set(seen) == {torch.complex128}


class Looped(nn.Module):
    """One block of layers, run again and again under as many names."""

    def __init__(self, times: int):
        super().__init__()
        up, down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.up, self.down = nn.ModuleList([up] * times), nn.ModuleList([down] * times)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_a_layer_of_several_names_moves_under_all_of_them(times):
    torch.manual_seed(0)
    model, inputs = Looped(times).eval(), torch.randn(4, 3)
    graph = mergeid.graph(model, inputs)
    assert only(graph, "up.0.weight", 0).size == 12 and only(graph, "stem.weight", 0).size == WIDTH
    assert graph.verified is not None and graph.verified["error_when_misapplied"] > 1e-3
    other = copy.deepcopy(model)
    with torch.no_grad():
        order = torch.randperm(12)
        other.up[0].weight.copy_(model.up[0].weight[order])
        other.up[0].bias.copy_(model.up[0].bias[order])
        other.down[0].weight.copy_(model.down[0].weight[:, order])
    torch.testing.assert_close(other(inputs), model(inputs))
    merged = copy.deepcopy(model)
    merged.load_state_dict(mergeid.merge(model, other, example_inputs=inputs, match="always").state)
    torch.testing.assert_close(merged(inputs), model(inputs))
    # a block that is said to move without what it reads is refuted
    stream = only(graph, "stem.weight", 0)
    wrong = replace(stream, axes=tuple(a for a in stream.axes if not a.tensor.startswith("up.")))
    held = replace(graph, spaces=[wrong])
    assert verify(held, model, (inputs,), call, generator=torch.Generator().manual_seed(0)).failed == (stream.id,)


class Slope(nn.Module):
    """Its forward pass takes a derivative through a layer with statistics, which no permutation changes by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(self.norm(self.a(x))).sum(-1)
            return energy.detach(), -torch.autograd.grad(energy.sum(), x)[0]


def test_statistics_settle_where_a_model_takes_derivatives():
    torch.manual_seed(0)
    model, inputs = Slope().double().eval(), torch.randn(5, 6).double()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), own_statistics(model):
        model(inputs)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "running" not in k)
    assert not torch.equal(model.norm.running_var, state["norm.running_var"]) and not model.norm.running_var.grad_fn
    with torch.no_grad():
        assert float(model.norm(model.a(inputs)).abs().max()) < 1  # near 0.1
    assert only(mergeid.graph(model, inputs), "a.weight", 0).size == 8
