"""The merged network, solved layer by layer."""

from __future__ import annotations

import copy
import threading
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_helpers import disturbed
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.repair.beyond import beyond
from mergeid.repair.closed_form import Fit
from mergeid.repair.layers import layer_of
from mergeid.repair.paced import Paced, Stop, record
from mergeid.repair.solve import Shares, solve_network


def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(batch["x"])


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Everything(nn.Module):
    """A layer of every kind that can be solved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.group = nn.Conv2d(8, 16, 3, groups=2, dilation=2), nn.GroupNorm(2, 16)
        self.layer, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.experts = nn.Parameter(torch.randn(2, 16, 24))
        self.scale, self.head = nn.Parameter(torch.ones(24)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(self.grouped(self.batch(self.conv(x)).relu())).relu().flatten(2).mT
        q, k, v = self.qkv(self.layer(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v)
        h = torch.bmm(torch.stack([h, h.tanh()]).flatten(1, 2), self.experts).sum(0)
        return self.head((h.view(len(x), -1, 24) * self.scale).mean(1))


def pair(seed: int = 0, kind: type[nn.Module] = Everything) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    a = disturbed(kind(), seed).float()
    b = copy.deepcopy(a)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in b.parameters():
        p.data += 0.3 * p.data.std() * torch.randn(p.shape, generator=generator)
    return a, b


X = seeded(64, 3, 12, 12)
BATCHES = [{"x": X[:24]}, {"x": X[24:]}]


def test_imitating_one_model_gives_it_back() -> None:
    """From A's weights, with B as the only model: every layer has an exact answer."""
    a, b = pair()
    merged = copy.deepcopy(a)
    done = solve_network(merged, [b], [1.0], forward, BATCHES)
    assert {w for layer in done for w in layer.weights} >= set(dict(a.named_parameters()))
    unseen = seeded(40, 3, 12, 12, seed=9)
    with torch.no_grad():
        far, near = ((m(unseen) - b(unseen)).norm() / b(unseen).norm() for m in (a, merged))
    assert far > 0.3 and near < 0.01
    assert all(layer.after <= layer.before for layer in done)


class Standardised(nn.Module):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12))
        self.around_one, self.head = nn.Parameter(0.1 * torch.randn(12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.kernel, dim=(1, 2, 3), keepdim=True)
        weight = self.gain * (self.kernel - mean) * torch.rsqrt(variance + 1e-5)
        h = self.normed(F.conv2d(x, weight).relu().mean((2, 3))).tanh()
        return self.head(h * (1 + self.around_one))


def test_hidden_layers_that_imitate_one_model_leave_the_last_to_the_mean() -> None:
    """From A on, with A's answers in all layers but the head: A's body, and the head that least squares gives."""
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    b = copy.deepcopy(a)
    for p in b.parameters():
        p.data = torch.randn_like(p)
    x = seeded(400, 6).double()
    net = copy.deepcopy(a)
    batches = [{"x": part} for part in x.split(100)]
    solve_network(net, [a, b], Shares([0.5, 0.5], [1.0, 0.0]), forward, batches)
    for name, value in net[:4].state_dict().items():
        assert torch.allclose(value, a[:4].state_dict()[name], atol=1e-9)
    with torch.no_grad():
        inside, mean = a[:4](x), (a(x) + b(x)) / 2
        plain = torch.cat([inside, torch.ones(400, 1).double()], 1)
        best = (plain @ torch.linalg.lstsq(plain, mean).solution - mean).square().mean()
        reached, before = (net(x) - mean).square().mean(), (a(x) - mean).square().mean()
    assert best <= reached * (1 + 1e-9) and reached < best + 0.05 * (before - best)


def test_weights_that_are_computed_from_parameters() -> None:
    a, b = pair(kind=Standardised)
    merged = copy.deepcopy(a)
    done = solve_network(merged, [b], [1.0], forward, BATCHES)
    assert [set(layer.weights) for layer in done] == [
        {"kernel", "gain"},
        {"normed.bias", "normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"},
        {"around_one"},
        {"head.weight", "head.bias"},
    ]
    unseen = seeded(40, 3, 12, 12, seed=9)
    with torch.no_grad():
        far, near = ((m(unseen) - b(unseen)).norm() / b(unseen).norm() for m in (a, merged))
    assert far > 0.2 and near < 0.02


class Contracted(nn.Module):
    """Weights that products take in another layout than they are stored in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(2, 20, 6))
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bchw,cpq->bhwpq", x, self.first).tanh().flatten(3).mean((1, 2))
        return self.head(self.turned(torch.einsum("bd,kde->bke", h, self.second)).tanh().flatten(1))


def test_weights_in_another_layout() -> None:
    a, b = pair(kind=Contracted)
    merged = copy.deepcopy(a)
    done = solve_network(merged, [b], [1.0], forward, BATCHES)
    assert {"first", "second"} <= {w for layer in done for w in layer.weights}
    unseen = seeded(40, 3, 12, 12, seed=9)
    with torch.no_grad():
        far, near = ((m(unseen) - b(unseen)).norm() / b(unseen).norm() for m in (a, merged))
    assert far > 0.2 and near < 0.1 * far


def test_a_merge_of_a_model_with_itself_stays_as_it_is() -> None:
    a, _ = pair()
    merged = copy.deepcopy(a)
    done = solve_network(merged, [a, copy.deepcopy(a)], [0.5, 0.5], forward, BATCHES)
    assert all(layer.ridge == inf for layer in done)
    for key, value in a.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value)


@pytest.mark.parametrize("size", [7, 64])
def test_the_batch_size_does_not_matter(size: int) -> None:
    a, b = pair()
    results = []
    for s in (32, size):
        merged = copy.deepcopy(a)
        solve_network(merged, [a, b], [0.5, 0.5], forward, [{"x": x} for x in X.split(s)])
        with torch.no_grad():
            results.append(merged(X))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


class Remembering(nn.Module):
    """Lays something aside while it runs, as U-Nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.up, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.aside = self.down(x).relu()
        h = self.inner(F.avg_pool2d(self.aside, 2)).relu()
        return self.head(self.up(torch.cat([self.aside, F.interpolate(h, scale_factor=2)], 1)).relu().mean((2, 3)))


def test_what_a_network_lays_aside_stays_with_its_batch() -> None:
    a, b = pair(kind=Remembering)
    results = []
    for size in (64, 16):
        merged = copy.deepcopy(a)
        done = solve_network(merged, [a, b], [0.5, 0.5], forward, [{"x": x} for x in X.split(size)])
        results.append([layer.after for layer in done])
        with torch.no_grad():
            results[-1].append(float(merged(X).norm()))
    assert len(results[0]) > 3 and results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-6)


def test_models_and_hooks_are_left_alone() -> None:
    a, b = pair()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    threads = threading.active_count()
    solve_network(copy.deepcopy(a), [a, b], [0.5, 0.5], forward, BATCHES)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert threading.active_count() == threads


class Shared(nn.Module):
    """A layer that is used twice and a head that is tied to the first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.once = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.once(self.twice(self.twice(self.table(x)).tanh()).tanh()).tanh())


def test_what_is_used_twice_stays_averaged() -> None:
    torch.manual_seed(0)
    a, b = Shared().eval(), Shared().eval()
    merged = copy.deepcopy(a)
    ids = torch.arange(60).reshape(20, 3) % 12
    done = solve_network(merged, [a, b], [0.5, 0.5], forward, [{"x": ids}])
    assert {w for layer in done for w in layer.weights} == {"once.weight", "once.bias"}
    assert torch.equal(merged.twice.weight, a.twice.weight) and torch.equal(merged.head.weight, a.head.weight)


def test_padding_is_not_looked_at() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    a, b = Tokens().eval(), Tokens().eval()
    x = seeded(40, 5, 6)
    mask = torch.ones(40, 5, dtype=torch.long)
    mask[:, 3:] = 0
    wild = x.clone()
    wild[:, 3:] = 1e3
    solved = []
    for values in (x, wild):
        merged = copy.deepcopy(a)
        solve_network(merged, [a, b], [0.5, 0.5], forward, [{"x": values, "attention_mask": mask}])
        solved.append(merged.layer.weight.detach())
    assert torch.equal(*solved)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 3), ((2, 1), (1, 2), (1, 2), 1)]
)
def test_patches_are_what_the_convolution_sees(stride: Any, padding: Any, dilation: Any, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(6, 9, (3, 2), stride, padding, dilation, groups).eval()
    x = seeded(4, 6, 9, 8)
    net = Paced(model, lambda m, b: m(b["x"]), {"x": x}, frozenset([0]), after=True)
    stop = net.advance()
    assert isinstance(stop, Stop)
    layer = layer_of(stop, 4)
    assert layer is not None and len(layer.parts) == groups
    at = torch.tensor([0, 3, layer.positions - 1])
    for places in (None, at):
        found = [(layer.inputs(g, layer.source, places), layer.answers(g, stop.out, places)) for g in range(groups)]
        for part, (inputs, answers) in zip(layer.parts, found, strict=True):
            assert part.bias is not None
            torch.testing.assert_close(inputs @ part.matrix.T + part.bias, answers, rtol=1e-4, atol=1e-5)
    net.close()


@pytest.mark.parametrize(
    ("stride", "padding", "more", "dilation", "groups"),
    [(1, 0, 0, 1, 1), (2, 1, 1, 1, 3), ((3, 2), (1, 3), (2, 0), (1, 2), 1), (2, 4, 0, 1, 2)],
)
def test_patches_of_transposed_convolutions(stride: Any, padding: Any, more: Any, dilation: Any, groups: int) -> None:
    """Every answer is the kernel's matrix times the patch, and what is written there moves the parameter."""
    torch.manual_seed(0)
    model = nn.ConvTranspose2d(6, 12, (3, 2), stride, padding, more, groups, True, dilation).eval()
    net = Paced(model, lambda m, b: m(b["x"]), {"x": seeded(4, 6, 9, 8)}, frozenset([0]), after=True)
    stop = net.advance()
    assert isinstance(stop, Stop)
    layer = layer_of(stop, 4)
    assert layer is not None and len(layer.parts) == groups
    for places in (None, torch.tensor([0, 3, layer.positions - 1])):
        for g, part in enumerate(layer.parts):
            inputs, answers = layer.inputs(g, layer.source, places), layer.answers(g, stop.out, places)
            assert part.bias is not None
            torch.testing.assert_close(inputs @ part.matrix.T + part.bias, answers, rtol=1e-4, atol=1e-5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        for part in layer.parts:
            part.write(Fit(2 * part.matrix.double(), None, 0.1, 1.0, 0.0))
    torch.testing.assert_close(model.weight.detach(), 2 * before)
    net.close()


def test_every_row_is_used_of_small_layers() -> None:
    """One layer, beside NumPy's least squares over exactly the rows that fit and judge together."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()
    x = seeded(32, 3)
    merged = copy.deepcopy(a)
    (done,) = solve_network(merged, [a, b], [0.25, 0.75], lambda m, q: m(q["x"]), [{"x": x}])
    with torch.no_grad():
        y = 0.25 * a(x) + 0.75 * b(x)
    expected = np.linalg.lstsq(np.concatenate([x.numpy(), np.ones((32, 1))], 1), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(merged.weight.detach().numpy(), expected[:, :3], atol=5e-3)
    np.testing.assert_allclose(merged.bias.detach().numpy(), expected[:, 3], atol=5e-3)
    assert done.ridge == 1e-3


class Routed(nn.Module):
    def __init__(self, cut: float) -> None:
        super().__init__()
        self.a, self.b, self.cut = nn.Linear(4, 4), nn.Linear(4, 4), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if float(x.sum()) > self.cut else self.b(self.a(x))


def test_other_operations_are_refused() -> None:
    torch.manual_seed(0)
    a, b = Routed(-1e9).eval(), Routed(1e9).eval()
    with pytest.raises(MergeidError, match="do not execute the same operations"):
        solve_network(copy.deepcopy(a), [a, b], [0.5, 0.5], forward, [{"x": seeded(8, 4)}])


def test_operations_of_a_pass() -> None:
    a, _ = pair()
    names = [stop.name for stop in record(a, forward, BATCHES[0]).stops]
    assert names.count("convolution") == 2 and names[-1] == "addmm"


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target)


def trained(seed: int) -> nn.Module:
    x, y = digits()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for i in torch.randperm(1200).split(50):
            optimiser.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimiser.step()
    return net.eval()


def test_merge_solves_on_request() -> None:
    """Independent seeds: what matching leaves of the barrier is nearly gone."""
    x, y = digits()
    a, b = trained(0), trained(1)
    data = [{"arg0": v} for v in x[:400]]
    losses = {}
    kinds, solved = {}, None
    for repair in ("none", "auto", "solve", "solve+polish"):
        result = mergeid.merge(a, b, data=data, example_inputs=x[:2], match="always", repair=repair, force=True)
        solved = result.repair if repair == "solve" else solved
        kinds[repair] = (result.repair or {}).get("kind")
        net = copy.deepcopy(a)
        net.load_state_dict(result.state)
        with torch.no_grad():
            losses[repair] = float(F.cross_entropy(net(x[1200:]), y[1200:]))
    with torch.no_grad():
        ends = sum(float(F.cross_entropy(m(x[1200:]), y[1200:])) for m in (a, b)) / 2
    assert solved is not None and solved["layers"] == 2  # averaged weights are exact on the network's own inputs
    assert solved["error_after"] < solved["error_before"] / 2
    assert result.repair is not None and result.repair["distance_after"] <= result.repair["distance_before"]
    assert losses["solve"] - ends < 0.25 * (losses["none"] - ends)
    assert kinds == {"none": None, "auto": "solve", "solve": "solve", "solve+polish": "solve+polish"}
    assert losses["auto"] == losses["solve"] and losses["solve+polish"] < losses["solve"] + 0.01


def test_solving_a_merge_with_a_scrambled_copy_gives_the_model_back() -> None:
    x, _ = digits()
    a = trained(0)
    graph = mergeid.graph(a, x[:2])
    b = copy.deepcopy(a)
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    data = [{"arg0": v} for v in x[:200]]
    result = mergeid.merge(a, b, data=data, example_inputs=x[:2], repair="solve")
    for key, value in a.state_dict().items():
        torch.testing.assert_close(result.state[key], value, rtol=1e-4, atol=1e-4)


def test_solve_needs_data() -> None:
    a = trained(0)
    with pytest.raises(MergeidError, match="--repair solve measures activations; give examples with --data"):
        mergeid.merge(a, a, example_inputs=torch.zeros(2, 64), repair="solve")


class Residual(nn.Module):
    """Writers of a residual stream: behind a BatchNorm, behind views, added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.batch, self.layer = nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.batch(self.conv(h.tanh())).add_(h)
        tokens = h.flatten(2).mT
        tokens = tokens + self.down(self.up(self.layer(tokens)).relu())
        return self.head(tokens.mean(1))


def test_what_lies_behind_a_layer_is_what_the_network_computes() -> None:
    """The map of every layer, beside the tensors of an ordinary pass."""
    net, _ = pair(kind=Residual)
    batch = {"x": X[:5]}
    seen = record(net, forward, batch)
    maps = beyond(seen.nodes)
    names = {stop.index: stop for stop in seen.stops}
    found = {"+".join(sorted(names[k].weights.values())): v for k, v in maps.items()}
    assert set(found) == {"conv.weight", "batch.bias+batch.running_mean+batch.running_var+batch.weight",
                          "down.bias+down.weight"}  # fmt: skip
    assert found["conv.weight"].shifts and not found["down.bias+down.weight"].shifts
    after: dict[str, Tensor] = {}
    for name in ("conv", "down", "head"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: after.update({name: o.clone()}))
    net.layer.register_forward_pre_hook(lambda m, i: after.update(stream=i[0].clone()))
    net.head.register_forward_pre_hook(lambda m, i: after.update(pooled=i[0].clone()))
    with torch.no_grad():
        net(X[:5])
    stream = after["stream"]
    first = after["conv"]
    held = stream.mT.reshape(first.shape) - net.batch(first)
    made = found["conv.weight"]
    (need,) = made.needs
    torch.testing.assert_close(made(net.state_dict(), {need: held}, first), stream.mT.reshape(first.shape))
    made = found["down.bias+down.weight"]
    (need,) = made.needs
    end = made(net.state_dict(), {need: stream}, after["down"].flatten(0, 1))
    torch.testing.assert_close(end.mean(1), after["pooled"])
    assert made.back(end).shape == after["down"].flatten(0, 1).shape
    assert torch.equal(made.gain(net.state_dict(), {need: stream}, after["down"].flatten(0, 1)).unique(), torch.ones(1))


def test_a_residual_stream_is_brought_back_to_the_models_own() -> None:
    """A layer that cannot be solved (it is used twice) puts the stream off; the next writer makes up for it."""

    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.twice(self.twice(x).tanh())
            return h + self.down(self.up(h).relu())

    torch.manual_seed(0)
    a, b = Drifting().eval(), Drifting().eval()
    merged = copy.deepcopy(a)
    x = seeded(512, 6)
    solve_network(merged, [b], [1.0], forward, [{"x": x}])
    unseen = seeded(100, 6, seed=4)
    with torch.no_grad():
        off = (merged.twice(merged.twice(unseen).tanh()) - b.twice(b.twice(unseen).tanh())).norm()
        left = (merged(unseen) - b(unseen)).norm()
    assert left < 0.5 * off


def test_channels_are_weighed_as_the_norm_behind_them_weighs_them() -> None:
    """Statistics that differ between the models: the layer is fitted to the mean of what is behind the norm."""
    torch.manual_seed(0)
    a, b = pair(kind=Residual)
    with torch.no_grad():  # the same function, other units in front of the norm
        factor = torch.logspace(-2, 2, 8)
        twin = copy.deepcopy(b)
        twin.conv.weight *= factor[:, None, None, None]
        twin.batch.running_mean *= factor
        twin.batch.running_var.copy_((b.batch.running_var + b.batch.eps) * factor**2 - b.batch.eps)
    results = []
    for other in (b, twin):
        merged = copy.deepcopy(a)
        solve_network(merged, [a, other], [0.5, 0.5], forward, BATCHES)
        with torch.no_grad():
            results.append(merged(X))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
