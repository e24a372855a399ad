"""Networks that round their weights and activations while they are trained (quantisation-aware training)."""

from __future__ import annotations

import pytest
import torch
from graph_helpers import only
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    disable_observer,
    fuse_modules_qat,
    get_default_qat_qconfig,
    prepare_qat,
)

import mergeid

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
]


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = QuantStub(), DeQuantStub()
        self.conv, self.norm, self.act, self.out = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(self.before(x))))
        return self.after(self.out(h.mean((2, 3))))


def prepared(backend: str, version: int, *, fused: bool, observed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Convolutional().train()
    model.qconfig = get_default_qat_qconfig(backend, version)
    if fused:
        model = fuse_modules_qat(model, [["conv", "norm", "act"]])
    model = prepare_qat(model)
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6))
    if not observed:
        model.apply(disable_observer)
    return model.eval()


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("backend", "version"), [("x86", 1), ("qnnpack", 1), ("fbgemm", 0)])
def test_prepared_networks(backend: str, version: int, fused: bool, observed: bool) -> None:
    """One step per channel, or one for all; the operations had no rule, and nothing was free."""
    model = prepared(backend, version, fused=fused, observed=observed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    graph = mergeid.graph(model, X)
    assert only(graph, "conv.weight", 0).size == 8
    assert only(graph, "conv.weight", 0) == only(graph, "out.weight", 1)
    if backend != "qnnpack":
        assert only(graph, "conv.weight_fake_quant.scale", 0) == only(graph, "conv.weight", 0)
    assert not graph.unknown_ops
    assert not [why for _, _, why in graph.frozen if "verification" in why]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


class Rounded(nn.Module):
    """Steps of its own, learned or given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 8), nn.Linear(8, 3)
        self.step, self.zero = nn.Parameter(torch.rand(8) * 0.02 + 0.01), nn.Parameter(torch.zeros(8))
        self.one, self.none = nn.Parameter(torch.tensor([0.05])), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.a.weight
        if self.kind == "given":
            w = torch.fake_quantize_per_channel_affine(w, self.step, self.zero.int(), 0, -128, 127)
        elif self.kind == "learned":
            w = torch._fake_quantize_learnable_per_channel_affine(w, self.step, self.zero, 0, -128, 127, 1.0)
        elif self.kind == "columns":
            w = torch.fake_quantize_per_channel_affine(w.T, self.step, self.zero.int(), 1, -128, 127).T
        h = nn.functional.linear(x, w, self.a.bias).relu()
        if self.kind == "learned":
            h = torch._fake_quantize_learnable_per_tensor_affine(h, self.one, self.none, 0, 255, 1.0)
        elif self.kind == "given":
            h = torch.fake_quantize_per_tensor_affine(h, 0.05, 0, 0, 255)
        else:
            h = torch.fake_quantize_per_tensor_affine(h, self.one, self.none.int(), 0, 255)
        return self.b(h)


@pytest.mark.parametrize("kind", ["given", "learned", "columns"])
def test_rounding_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    graph = mergeid.graph(Rounded(kind).eval(), torch.randn(5, 6))
    assert only(graph, "a.weight", 0) == only(graph, "b.weight", 1) == only(graph, "step", 0)
    assert not graph.unknown_ops


def test_a_copy_in_another_order_is_brought_back() -> None:
    a, b = (prepared("x86", 1, fused=True, observed=False) for _ in range(2))
    graph = mergeid.graph(a, X)
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    state = mergeid.merge(a, b, example_inputs=X, match="always").state
    assert state is not None
    assert all(torch.allclose(state[k], v, atol=1e-6) for k, v in a.state_dict().items() if v.is_floating_point())
