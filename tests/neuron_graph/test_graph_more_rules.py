"""Rules for operations that few networks use: what a rule says against every permutation of the neurons, tried."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_helpers import only, seeded, sound, traced
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mergeid

N = 4
"""Hidden neurons: all 24 orders are tried."""
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A layer of N neurons, what is tested, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.a, self.between, self.head = nn.Linear(5, N), between, nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.a(x)))


def exchangeable(model: nn.Module, moved: list[tuple[str, int]]) -> bool:
    """By brute force: whether every order of the neurons on these axes, all moved alike, leaves the output as it is."""
    state = model.state_dict()
    with torch.no_grad():
        before = model(X.double())
        for order in permutations(range(N)):
            probe = copy.deepcopy(model)
            changed = dict(state)
            for tensor, axis in moved:
                changed[tensor] = changed[tensor].index_select(axis, torch.tensor(order))
            probe.load_state_dict(changed)
            if not torch.allclose(probe(X.double()), before, rtol=0, atol=1e-9):
                return False
    return True


def windows(h: Tensor) -> Tensor:
    """[3, N] -> [3, N, 6, 6]: maps that differ from channel to channel."""
    return h[:, :, None, None] * torch.linspace(1, 2, 36).to(h).reshape(6, 6) + torch.linspace(0, 1, 6).to(h)


def bagged(h: Tensor) -> Tensor:
    y, places = F.max_pool2d(windows(h), 2, return_indices=True)
    return F.max_unpool2d(y, places, 2).mean((2, 3))


def recurrent(h: Tensor) -> Tensor:
    """Packed and unpacked again: steps that are not there are zeros."""
    steps = torch.stack([h, 2 * h, h.sin()])
    packed = pack_padded_sequence(steps, torch.tensor([3, 1, 2]), enforce_sorted=False)
    return pad_packed_sequence(packed)[0].sum(0)


def masked(h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0.2] = 0.5
    return h


WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "packed sequences": recurrent,
    "a write through a mask": masked,
    "unpooled": bagged,
    "fold": lambda h: F.fold(F.unfold(windows(h), 2, stride=2), (6, 6), 2, stride=2).mean((2, 3)),
    "renorm": lambda h: torch.renorm(h, 2, 0, 0.5),
    "segments": lambda h: torch.segment_reduce(h, "sum", lengths=torch.tensor([2, 1]), axis=0),
    "buckets": lambda h: torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5]).to(h)).to(h),
    "outer sum": lambda h: torch.addr(h, torch.linspace(1, 2, 3).to(h), h.mean(0)),
    "windows added up": lambda h: torch.istft(
        torch.stft(windows(h).flatten(2).flatten(0, 1), 8, window=torch.ones(8).to(h), return_complex=True),
        8, window=torch.ones(8).to(h),
    ).mean(-1).reshape(3, N),
    "by the largest": lambda h: h / h.abs().max(-1, keepdim=True).values,
    "by the smallest": lambda h: h - h.min(1, keepdim=True)[0],
    "by the median": lambda h: h - h.median(-1, keepdim=True).values,
    "by the median of numbers": lambda h: h - h.nanmedian(-1, keepdim=True).values,
    "by the commonest": lambda h: h - h.round().mode(-1, keepdim=True).values,
    "by both ends": lambda h: h / (h.aminmax(dim=-1, keepdim=True)[1] - h.aminmax(dim=-1, keepdim=True)[0]),
    "a small value": lambda h: windows(h).flatten(2).kthvalue(3, 2)[0],
    "a small value kept": lambda h: windows(h).kthvalue(2, 3, keepdim=True)[0].mean((2, 3)),
    "quarter turns": lambda h: (torch.rot90(windows(h), 3, (2, 3)) * windows(h)).mean((2, 3)),
    "turned with the batch": lambda h: torch.rot90(h, 1, (1, 0)).T * torch.rot90(h, 2, (0, -1)).flip(1),
    "sorted bounds": lambda h: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]).to(h), h).to(h) + h,
    "rows of bounds": lambda h: torch.searchsorted(h.mean(1, keepdim=True).repeat(1, 2), h).to(h) + h,
    "a sparse graph": lambda h: torch.sparse.mm((torch.arange(9).reshape(3, 3) % 2).to(h).to_sparse(), h),
    "equal": lambda h: h * (2 if torch.equal(h, h.relu()) else 3),
}  # fmt: skip
"""[3, N] -> [rows, N]: the neurons stay what they are."""


@pytest.mark.parametrize("name", WITHIN)
def test_neurons_pass_through(name: str) -> None:
    def make() -> nn.Module:
        return Around(WITHIN[name], N)

    graph = sound(make, (X,))
    assert only(graph, "a.weight", 0) is only(graph, "head.weight", 1)
    assert only(graph, "a.weight", 0).size == N
    assert exchangeable(seeded(make), [("a.weight", 0), ("a.bias", 0), ("head.weight", 1)])


SUMMED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "distances of batches": (lambda h: torch.cdist(h[None], h.sin()[None])[0], 3),
    "city blocks": (lambda h: torch.cdist(h, h.sin(), p=1), 3),
    "own distances": (lambda h: F.pdist(h.sin())[None], 3),
    "a trace": (lambda h: (h.T @ h).trace().reshape(1, 1), 1),
    "a diagonal": (lambda h: (h @ h.T).diagonal()[None], 3),
    "many products": (lambda h: torch.addbmm(torch.zeros(3, 3).to(h), h[None], h.T[None]), 3),
}
"""[3, N] -> numbers that all neurons go into."""


@pytest.mark.parametrize("name", SUMMED)
def test_neurons_are_summed(name: str) -> None:
    def make() -> nn.Module:
        return Around(*SUMMED[name])

    graph = sound(make, (X,))
    assert only(graph, "a.weight", 0).size == N
    assert exchangeable(seeded(make), [("a.weight", 0), ("a.bias", 0)])


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "as a number": lambda h: h.max(-1, keepdim=True).indices.to(h) + h.mean(-1, keepdim=True),
    "to look up": lambda h: torch.linspace(0, 1, N).to(h)[h.min(-1).indices][:, None],
    "of a view": lambda h: h.median(-1).indices[:, None].to(h),
    "in a branch": lambda h: h.mode(-1, keepdim=True).values * (2 if h.max(-1)[1][0].item() > 1 else 3),
    "into memory": lambda h: torch.max(h, 1, keepdim=True, out=(h.new_empty(3, 1), torch.empty(3, 1).long()))[0],
}
"""[3, N] -> [3, 1], by where something stands among the neurons (or written where that can be seen later)."""


@pytest.mark.parametrize("name", PLACES)
def test_places_among_neurons_that_are_used_fix_them(name: str) -> None:
    graph = sound(lambda: Around(PLACES[name], 1), (X,))
    assert "a.weight" not in graph.on_tensor or all(a.axis == 1 for _, a in graph.on_tensor["a.weight"])


class Largest(nn.Module):
    """Returns where the largest neuron is, or does not."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.a, self.head, self.places = nn.Linear(5, N), nn.Linear(1, 2), places

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.a(x).max(-1, keepdim=True)
        return (self.head(found.values), found.indices) if self.places else (self.head(found.values),)


@pytest.mark.parametrize("places", [True, False])
def test_places_that_are_returned_fix_neurons(places: bool) -> None:
    graph = sound(lambda: Largest(places), (X,))
    assert ("a.weight" in graph.on_tensor) != places


class Tangent(nn.Module):
    """The derivative along a direction (forward mode), in which that of a bias is a zero without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(5, N), nn.LayerNorm(N), nn.Linear(N, 2)

    def forward(self, x: Tensor) -> Tensor:
        def network(y: Tensor) -> Tensor:
            return self.head(self.norm(self.a(y)).tanh())

        tangent: Tensor = torch.func.jvp(network, (x,), (torch.ones_like(x),))[1]
        return tangent


def test_forward_mode_derivatives() -> None:
    graph = sound(Tangent, (X,))
    assert only(graph, "a.weight", 0) is only(graph, "norm.weight", 0) is only(graph, "head.weight", 1)
    moved = [("a.weight", 0), ("a.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("head.weight", 1)]
    assert exchangeable(seeded(Tangent), moved)


class Force(nn.Module):
    """A derivative by the input, taken in the forward pass."""

    def __init__(self, between: Callable[[], nn.Module], train: bool = False) -> None:
        super().__init__()
        self.a, self.between, self.head = nn.Linear(5, N), between(), nn.Linear(N, 2)
        self.as_training = train

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.between.train(self.as_training)
            energy = self.head(self.between(self.a(x)).sin()).sum()
            force: Tensor = -torch.autograd.grad(energy, x)[0]
            return force


class Meta(Force):
    """A step of gradient descent inside the forward pass: derivatives by scale and shift too."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            own = [p.detach().requires_grad_() for p in self.between.parameters()]
            names = [k for k, _ in self.between.named_parameters()]
            y = torch.func.functional_call(self.between, dict(zip(names, own, strict=True)), (self.a(x),))
            slopes = torch.autograd.grad(self.head(y.sin()).sum(), own)
        moved = {k: p - 0.1 * s for k, p, s in zip(names, own, slopes, strict=True)}
        out: Tensor = self.head(torch.func.functional_call(self.between, moved, (self.a(x),)))
        return out.detach()


SLOPES: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softshrink, nn.Hardshrink,
            nn.LogSigmoid, nn.Mish,
        )
    },
    "RReLU": nn.RReLU, "PReLU": lambda: nn.PReLU(N),
    "Softmax": lambda: nn.Softmax(-1), "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "LayerNorm": lambda: nn.LayerNorm(N), "RMSNorm": lambda: nn.RMSNorm(N), "BatchNorm": lambda: nn.BatchNorm1d(N),
    "GroupNorm": lambda: nn.GroupNorm(1, N), "InstanceNorm": lambda: nn.GroupNorm(N, N),
}  # fmt: skip


def moves_of(model: nn.Module) -> list[tuple[str, int]]:
    inside = [(k, 0) for k, v in model.state_dict().items() if k.startswith("between.") and v.shape == (N,)]
    return [("a.weight", 0), ("a.bias", 0), ("head.weight", 1), *inside]


@pytest.mark.parametrize(("name", "train"), [*((k, False) for k in SLOPES), ("BatchNorm", True)])
def test_derivatives_inside_a_forward_pass(name: str, train: bool) -> None:
    def make() -> nn.Module:
        return Force(SLOPES[name], train)

    graph = sound(make, (X,))
    assert not graph.unknown_ops
    assert only(graph, "a.weight", 0) is only(graph, "head.weight", 1)
    assert exchangeable(seeded(make), moves_of(seeded(make)))


@pytest.mark.parametrize("name", ["PReLU", "LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm"])
def test_derivatives_by_gains(name: str) -> None:
    def make() -> nn.Module:
        return Meta(SLOPES[name])

    graph = sound(make, (X,))
    assert not graph.unknown_ops
    assert only(graph, "a.weight", 0) is only(graph, "between.weight", 0) is only(graph, "head.weight", 1)
    assert exchangeable(seeded(make), moves_of(seeded(make)))


def test_derivatives_of_groups_stay_in_groups() -> None:
    graph = sound(lambda: Force(lambda: nn.GroupNorm(2, N)), (X,))
    assert only(graph, "a.weight", 0).blocks == 2


class Matrices(nn.Module):
    """A square matrix between two layers, as a function of itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head, self.function = nn.Linear(5, N), nn.Linear(N, 2), function
        self.m = nn.Parameter(torch.eye(N) + 0.3 * torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) @ self.function(self.m))


def rooted(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values.abs().sqrt()) @ vectors.mT


MATRICES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "inverse": (torch.linalg.inv, False),
    "solution": (lambda m: torch.linalg.solve(m, torch.eye(N).to(m)), False),
    "exponential": (torch.matrix_exp, True),
    "exponential of a skew matrix": (lambda m: torch.matrix_exp(m - m.T), True),
    "eigenvectors": (lambda m: rooted(m + m.T), True),
    "eigenvalues": (lambda m: m * torch.linalg.eigvalsh(m + m.T)[0], True),
    "determinant": (lambda m: m * torch.linalg.det(m), True),
    "sign of a determinant": (lambda m: m * torch.linalg.slogdet(m).sign * torch.linalg.slogdet(m).logabsdet, True),
    "diagonal": (lambda m: torch.diag_embed(m.diagonal()), True),
    "product with a diagonal": (lambda m: m @ torch.diag(m.diagonal()), True),
}
"""A function of a matrix, and whether rows and columns have to move together."""


@pytest.mark.parametrize("name", MATRICES)
def test_functions_of_matrices(name: str) -> None:
    function, together = MATRICES[name]

    def make() -> nn.Module:
        return Matrices(function)

    graph = sound(make, (X,))
    rows, columns = only(graph, "a.weight", 0), only(graph, "head.weight", 1)
    assert rows.size == columns.size == N
    axes = [("a.weight", 0), ("a.bias", 0), ("m", 1 if not together else 0)]
    more = [("m", 1), ("head.weight", 1)] if together else []
    assert exchangeable(seeded(make), [*axes, *more])
    assert (rows is columns) == together
    if together:
        assert not exchangeable(seeded(make), axes)


class Joint(nn.Module):
    """Positions of a matrix that come from one layer: no order of them is one of rows and columns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head, self.function = nn.Linear(5, 9), nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.a(x).reshape(3, 3, 3)).sum(1))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_distance_of_two_tensors_sums_over_all(p: float) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, N), nn.Linear(5, N), nn.Linear(N, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.a(x), self.b(x)
            return self.head(one) * torch.dist(one, two, p)

    graph = sound(Apart, (X,))
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 0) is only(graph, "head.weight", 1)


@pytest.mark.parametrize(
    "function",
    [
        torch.linalg.inv,
        torch.matrix_exp,
        lambda m: m * torch.linalg.det(m)[..., None, None],
        lambda m: torch.linalg.solve(m, m.sin()),
    ],
)
def test_a_matrix_out_of_one_layer(function: Callable[[Tensor], Tensor]) -> None:
    sound(lambda: Joint(function), (X,))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.head = nn.Linear(5, N), nn.Linear(5, 6), nn.Bilinear(N, 6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.a(x), self.b(x)).tanh())


def test_bilinear_layers() -> None:
    graph = sound(Bilinear, (X,))
    assert only(graph, "a.weight", 0) is only(graph, "both.weight", 1)
    assert only(graph, "b.weight", 0) is only(graph, "both.weight", 2)
    assert only(graph, "both.weight", 0) is only(graph, "head.weight", 1)


class Square(nn.Module):
    """The diagonal of a product: rows and columns are the same neurons, or shifted ones."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.a, self.b, self.head, self.offset = nn.Linear(5, N), nn.Linear(5, N), nn.Linear(N - offset, 2), offset

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("bi,bj->bij", self.a(x), self.b(x)).diagonal(self.offset, 1, 2))


def test_diagonals() -> None:
    graph = sound(lambda: Square(0), (X,))
    assert only(graph, "a.weight", 0) is only(graph, "b.weight", 0) is only(graph, "head.weight", 1)
    shifted = sound(lambda: Square(1), (X,))
    for tensor in ("a.weight", "b.weight"):  # only the end that no other neuron meets is fixed
        assert all(s.size < N for s, _ in shifted.on_tensor.get(tensor, []))


class Packed(nn.Module):
    """A recurrent network over sequences of different lengths."""

    def __init__(self, kind: type[nn.RNNBase], **options: int) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.rnn = kind(6, 8, **options)
        self.head = nn.Linear(options.get("proj_size") or 8, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(self.a(x), lengths, batch_first=False, enforce_sorted=False)
        out, last = self.rnn(packed)
        return self.head(pad_packed_sequence(out)[0]), self.head((last[0] if isinstance(last, tuple) else last)[-1])


@pytest.mark.parametrize(
    ("kind", "options"), [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {"num_layers": 2}), (nn.LSTM, {"proj_size": 3})]
)
def test_packed_recurrent_networks(kind: type[nn.RNNBase], options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Packed(kind, **options)
    inputs = (torch.randn(4, 3, 5), torch.tensor([2, 4, 3]))
    graph = mergeid.graph(model, inputs)  # in float32: its kernels are others
    assert graph.verified is not None and graph.verified["max_relative_error"] < 1e-6
    assert not [why for _, _, why in graph.frozen if why.startswith(("no rule", "verification"))]
    assert only(graph, "a.weight", 0) is only(graph, "rnn.weight_ih_l0", 1)
    assert only(graph, "head.weight", 1).size == (options.get("proj_size") or 8)
    assert graph.share > 0.99
    sound(lambda: Packed(kind, **options), inputs)


class Steps(nn.Module):
    """A recurrent network along what were neurons: their order counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.head = nn.Linear(5, N), nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.a(x)[:, :, None])[0][:, -1])


def test_steps_of_a_recurrent_network_have_an_order() -> None:
    torch.manual_seed(0)
    model = Steps()
    graph = mergeid.graph(model, X)
    assert "a.weight" not in graph.on_tensor
    assert [why for t, a, why in graph.frozen if (t, a) == ("a.weight", 0)] == ["aten.mkldnn_rnn_layer at rnn"]
    assert only(graph, "head.weight", 1).size == 6


class Flexible(nn.Module):
    """flex_attention takes functions, and compiles itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(5, 48), nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).reshape(1, len(x), 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + 0.1 * (i - j))
        return self.head(self.out(y.transpose(1, 2).reshape(1, len(x), 16)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:.*_FLEX_ATTENTION")
def test_flex_attention_is_looked_into() -> None:
    torch.manual_seed(0)
    graph = mergeid.graph(Flexible(), torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    assert not graph.unknown_ops and graph.share > 0.9
    assert {8, 16} <= {s.members if s.blocks > 1 else s.size for s in graph.spaces} | {s.size for s in graph.spaces}
    assert np.all([a.index.max() >= 0 for s in graph.spaces for a in s.axes])


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, N), torch.compile(nn.Sequential(nn.ReLU(), nn.Linear(N, 2)), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_parts_run_as_they_are_written() -> None:
    graph = traced(seeded(Compiled), (X.double(),))
    assert only(graph, "a.weight", 0) is only(graph, "b._orig_mod.1.weight", 1)


class Filled(nn.Module):
    """Memory without values, written piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, N), nn.Linear(5, N), nn.Linear(2 * N, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), 2 * N, dtype=x.dtype)
        out[:, :N] = self.a(x)
        out[:, N:] = self.b(x)
        return self.head(out)


def test_memory_without_values() -> None:
    graph = sound(Filled, (X,))
    assert only(graph, "a.weight", 0).size == only(graph, "b.weight", 0).size == N
