"""Rules that whole libraries lean on: spectra, bags of embeddings, deformable convolutions, losses as outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import on, only, sound
from torch import Tensor, nn

import mergeid
from mergeid.neuron_graph.compare import Yardstick
from mergeid.neuron_graph.powers import find_powers


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Spectral(nn.Module):
    """A Fourier layer whose complex weight is kept as two real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.beside, self.head = nn.Conv1d(8, 12, 1), nn.Conv1d(12, 12, 1), nn.Conv1d(12, 2, 1)
        self.real, self.imaginary = (nn.Parameter(torch.randn(12, 12, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x)
        found = torch.fft.rfft(h)
        low = torch.zeros_like(found)
        low[..., :4] = torch.einsum("bim,iom->bom", found[..., :4], torch.complex(self.real, self.imaginary))
        return self.head(F.gelu(torch.fft.irfft(low, n=x.shape[-1]) + self.beside(h)))


def test_complex_weights_in_two_parts() -> None:
    graph = sound(Spectral, (seeded(2, 8, 16),))
    inner, outer = only(graph, "real", 0), only(graph, "real", 1)
    assert inner.size == outer.size == 12 and inner is not outer
    assert only(graph, "imaginary", 0) is inner and only(graph, "imaginary", 1) is outer


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.table, self.head = nn.EmbeddingBag(30, 16, mode=mode), nn.Linear(16, 3)

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.head(self.table(ids, starts).relu())


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_embedding_bag(mode: str) -> None:
    graph = sound(lambda: Bag(mode), (torch.arange(12) * 7 % 30, torch.tensor([0, 4, 9])))
    assert only(graph, "table.weight", 1).size == 16
    assert {t: a for t, a, _ in graph.frozen}["table.weight"] == 0


class Deformable(nn.Module):
    def __init__(self, groups: int, offset_groups: int) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 4, 1)
        self.groups = groups
        self.offsets = nn.Conv2d(4, 18 * offset_groups, 3, padding=1)
        self.weight, self.head = nn.Parameter(torch.randn(8, 4 // groups, 3, 3)), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        x = self.front(x)
        return self.head(deform_conv2d(x, self.offsets(x) / 10, self.weight, padding=1).relu())


@pytest.mark.parametrize(("groups", "offset_groups", "sizes"), [(1, 1, [4, 8]), (1, 2, []), (2, 1, [])])
def test_deformable_convolution(groups: int, offset_groups: int, sizes: list[int]) -> None:
    graph = sound(lambda: Deformable(groups, offset_groups), (seeded(2, 3, 7, 7),))
    assert sorted(s.size for s in graph.spaces if s.size > 1) == sizes


class Trained(nn.Module):
    """Returns its losses beside what it says, as many do in evaluation too."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.code, self.back = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        code = self.code(x).tanh()
        back = self.back(code)
        kept = F.mse_loss(code, code.detach() / 2, reduction=self.reduction)
        return back, F.smooth_l1_loss(back, x), kept if self.reduction != "none" else kept.sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_as_outputs(reduction: str) -> None:
    graph = sound(lambda: Trained(reduction), (seeded(4, 8),))
    assert [s.size for s in graph.spaces] == [16]


def test_numbers_that_are_none() -> None:
    nan, x = torch.full((), torch.nan), torch.tensor([1.0, torch.nan])
    assert Yardstick({"": nan}).error({"": nan}) == 0
    assert Yardstick({"": x}).error({"": x.clone()}) == 0
    assert Yardstick({"": x}).error({"": torch.tensor([1.5, torch.nan])}) == pytest.approx(0.5)
    assert Yardstick({"": x}).error({"": torch.tensor([1.0, 2.0])}) == float("inf")
    assert Yardstick({"": torch.tensor([1.0, 2.0])}).error({"": x}) == float("inf")


class OneMemory(nn.Module):
    """Two layers whose weights share memory without being one parameter."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.e, self.f, self.d, self.how = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6), how
        if how == "data":
            self.f.weight.data = self.e.weight.data
        elif how == "turned":
            self.d.weight = nn.Parameter(self.e.weight.t())
        elif how == "flat":
            flat = torch.randn(2, 8, 6)
            self.e.weight.data, self.f.weight.data = flat[0], flat[1]
        elif how == "columns":
            flat = torch.randn(8, 12)
            self.e.weight.data, self.f.weight.data = flat[:, :6], flat[:, 6:]
        elif how == "part":
            flat = torch.randn(9, 6)
            self.e.weight.data, self.f.weight.data = flat[:8], flat[1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.e(x).relu()) + self.f(x).tanh().sum(-1, keepdim=True)


@pytest.mark.parametrize("how", ["apart", "data", "turned", "flat", "columns", "part"])
def test_weights_of_one_memory(how: str) -> None:
    torch.manual_seed(0)
    model, inputs = OneMemory(how).eval(), torch.randn(5, 6)
    graph = mergeid.graph(model, inputs)
    one, two = on(graph, "e.weight", 0), on(graph, "f.weight", 0)
    assert (one and one == on(graph, "d.weight", 1)) or how == "part"
    if how == "part":
        assert not one and not two
        assert "e.weight lies in memory that is also another tensor's" in {why for _, _, why in graph.frozen}
    else:
        assert (one == two) == (how == "data") and two
    before = model(inputs)
    for seed in range(3):
        element = graph.random_element(torch.Generator().manual_seed(seed))
        state = graph.apply_state(element, {k: v.clone() for k, v in model.state_dict().items()})
        model.load_state_dict(state)  # into the memory that is shared
        torch.testing.assert_close(model(inputs), before)


@pytest.mark.parametrize("how", ["apart", "data", "turned", "columns"])
def test_scales_of_weights_of_one_memory(how: str) -> None:
    torch.manual_seed(0)
    model, inputs = OneMemory(how).eval(), torch.randn(5, 6)
    graph = mergeid.graph(model, inputs)
    found = find_powers(
        graph, model, inputs, lambda m, x: m(x), generator=torch.Generator(), only=[s.id for s in graph.spaces]
    )
    assert bool(found.scaled) == (how in ("apart", "columns"))
    before = model(inputs)
    for k, one in enumerate(found.scaled):
        turn = one.scale(1 + torch.rand(one.size, generator=torch.Generator().manual_seed(k)).double().numpy())
        model.load_state_dict({k: turn.apply(k, v.clone()) for k, v in model.state_dict().items()})
        torch.testing.assert_close(model(inputs), before)
