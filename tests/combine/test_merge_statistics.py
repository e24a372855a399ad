"""Gram matrices and Fisher information against naive loops and autograd, and the merges that use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import forward
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.methods.fisher import fisher
from mergeid.methods.regmean import regmean
from mergeid.methods.statistics import affine_axis, fisher_diagonal, gram_matrices, single_examples

F64 = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 7)
        self.two = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().eval()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("size", [30, 7, 1])
def test_gram_matrices(size: int) -> None:
    model, x = net(), data(30, 4, 5)  # 4 positions per example
    found = gram_matrices(model, [{"x": part} for part in x.split(size)], forward=forward)
    assert set(found) == {"one.weight", "two.weight", "head.weight"}
    with torch.no_grad():
        hidden = torch.tanh(model.one(x)).reshape(-1, 7).numpy()
    np.testing.assert_allclose(found["one.weight"].matrix, x.reshape(-1, 5).T @ x.reshape(-1, 5) / 120, rtol=1e-10)
    np.testing.assert_allclose(found["two.weight"].matrix, hidden.T @ hidden / 120, rtol=1e-10)
    assert {g.axis for g in found.values()} == {1}
    assert not any(m._forward_hooks for m in model.modules())


def test_linear_layers_are_known_by_what_they_do() -> None:
    from transformers.pytorch_utils import Conv1D

    x = data(6, 5)
    torch.manual_seed(0)
    square = Conv1D(5, 5).double()
    nn.init.normal_(square.weight)
    assert affine_axis(square, x, square(x)) == 0
    assert affine_axis(nn.Linear(5, 5).double(), x, nn.Linear(5, 5).double()(x)) is None  # another layer's output
    embedding = nn.Embedding(4, 5)
    ids = torch.tensor([1, 2])
    assert affine_axis(embedding, ids, embedding(ids)) is None


def test_padding_does_not_count() -> None:
    model, x = net(), data(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])

    def run(module: nn.Module, batch: dict) -> Tensor:
        return module(batch["x"])

    found = gram_matrices(model, [{"x": x, "attention_mask": mask}], forward=run)
    rows = x[mask.bool()]
    torch.testing.assert_close(found["one.weight"].matrix, rows.T @ rows / 7)
    widths = [len(e["attention_mask"][0]) for e in single_examples({"ids": mask, "attention_mask": mask})]
    assert widths == [4, 2, 1]


@pytest.mark.parametrize("size", [12, 1])
def test_rows_that_are_not_finite_do_not_count(size: int) -> None:
    """The same matrices as from the finite rows alone, wherever the others stand."""
    model, x = net(), data(12, 5)
    bad = torch.arange(12).remainder(5) < 2
    spoilt = x.clone()
    spoilt[bad, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan, torch.inf], dtype=F64)
    found = gram_matrices(model, [{"x": part} for part in spoilt.split(size)], forward=forward)
    with torch.no_grad():
        inner = model.one(spoilt).tanh()
    expected = {"one.weight": x[~bad], "two.weight": inner[inner.isfinite().all(1)]}
    assert bad.sum() == 6 and len(expected["two.weight"]) >= 6
    for name, rows in expected.items():
        torch.testing.assert_close(found[name].matrix, rows.T @ rows / len(rows))


def test_tied_weights_have_no_inputs_of_their_own() -> None:
    model = net()
    model.two.weight = nn.Parameter(torch.eye(7, dtype=F64))
    model.head = nn.Linear(7, 7).double()
    model.head.weight = model.two.weight
    assert set(gram_matrices(model, [{"x": data(8, 5)}], forward=forward)) == {"one.weight"}


@pytest.mark.parametrize("size", [2000, 300])
def test_fisher_is_the_expected_squared_score(size: int) -> None:
    """Against the exact expectation over all classes, Σ_y p(y|x) (∂ log p(y|x))², within sampling error."""
    model, x = net(), data(2000, 5)
    generator = torch.Generator().manual_seed(0)
    found = fisher_diagonal(model, [{"x": p} for p in x.split(size)], forward=forward, generator=generator)
    params = dict(model.named_parameters())
    exact = {n: torch.zeros_like(p) for n, p in params.items()}
    for example in x[:400]:
        logits = torch.log_softmax(model(example), -1)
        for y in range(3):
            gradients = torch.autograd.grad(logits[y], list(params.values()), retain_graph=True)
            for name, gradient in zip(params, gradients, strict=True):
                exact[name] += logits[y].exp().detach() * gradient**2 / 400
    for name in params:
        assert found[name].shape == params[name].shape and found[name].dtype == F64
        assert (found[name] - exact[name]).abs().max() < 0.2 * exact[name].max()
        assert found[name].sum().item() == pytest.approx(exact[name].sum().item(), rel=0.1)


def test_fisher_is_reproducible_and_leaves_the_model_alone() -> None:
    model, x = net(), data(20, 5)
    model.one.weight.requires_grad_(False)
    results = [
        fisher_diagonal(
            model, [{"x": p} for p in x.split(k)], forward=forward, generator=torch.Generator().manual_seed(4)
        )
        for k in (20, 3)
    ]
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert not model.one.weight.requires_grad and model.two.weight.requires_grad and model.two.weight.grad is None


def test_no_data_is_named() -> None:
    with pytest.raises(MergeidError, match="Fisher information needs gradients on examples"):
        fisher_diagonal(net(), [], forward=forward, generator=torch.Generator())
    with pytest.raises(MergeidError, match="RegMean needs the inputs of every layer, which data give"):
        gram_matrices(net(), [], forward=forward)
    with pytest.raises(MergeidError, match="does not fit the model"):
        gram_matrices(net(), [{"x": data(2, 3)}], forward=forward)


# --- merges ------------------------------------------------------------------------------------------------------


def live(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).eval()


def test_merges_with_statistics() -> None:
    a, b = live(0), live(1)
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))
    rows = [{"arg0": x} for x in inputs]
    how = {"data": rows, "example_inputs": inputs[:2], "match": "never", "repair": "none", "force": True}
    found = mergeid.merge(a, b, method="regmean", parameters={"alpha": 1.0}, **how).state
    grams = [gram_matrices(m, [{"x": inputs}], forward=lambda m, batch: m(batch["x"])) for m in (a, b)]
    for name, weights in (("0.weight", [a[0].weight, b[0].weight]), ("2.weight", [a[2].weight, b[2].weight])):
        expected = regmean([w.detach() for w in weights], [0.5, 0.5], statistics=[g[name] for g in grams], alpha=1.0)
        torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(found["0.bias"], (a[0].bias + b[0].bias).detach() / 2)

    def run(model: nn.Module, batch: dict) -> Tensor:
        return model(batch["x"])

    told = [
        fisher_diagonal(m, [{"x": inputs}], forward=run, generator=torch.Generator().manual_seed(0)) for m in (a, b)
    ]
    found = mergeid.merge(a, b, method="fisher", weights=(0.3, 0.7), **how).state
    for name in found:
        tensors = [m.state_dict()[name] for m in (a, b)]
        torch.testing.assert_close(found[name], fisher(tensors, [0.3, 0.7], statistics=[t[name] for t in told]))


def test_statistics_follow_the_neurons() -> None:
    """B is A with its neurons scrambled: matched, every method gives A back, statistics included."""
    a, b = live(0), live(0)
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    graph = mergeid.graph(a, inputs[:2])
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), b.state_dict()))
    how = {"data": [{"arg0": x} for x in inputs], "example_inputs": inputs[:2]}
    for method in ("regmean", "fisher", "slerp", "karcher"):
        result = mergeid.merge(a, b, method=method, **how)
        assert result.verdict == "match"
        for name, value in result.state.items():
            torch.testing.assert_close(value, a.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_several_models_and_a_base_in_other_orders(tmp_path: Path) -> None:
    """Each further model, and the base, is brought into the first one's order."""
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    base = live(0)
    graph = mergeid.graph(base, inputs[:2])
    models = []
    for seed in range(3):
        model = live(0)
        noise = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=noise))
        models.append(model)

    def scrambled(model: nn.Module, seed: int) -> nn.Module:
        moved = live(0)
        element = graph.random_element(torch.Generator().manual_seed(seed))
        moved.load_state_dict(graph.apply_state(element, model.state_dict()))
        return moved

    others = [models[0], scrambled(models[1], 1), scrambled(models[2], 2)]
    how = {"data": [{"arg0": x} for x in inputs], "example_inputs": inputs[:2], "match": "always", "repair": "none"}
    told = {"method": "ties", "density": 0.5, "weights": (1.0, 0.5, 0.7)}
    found = mergeid.merge(others, base=scrambled(base, 3), **told, **how)
    assert len(found.plans) == 3 and found.verdict == "match"
    expected = mergeid.merge(models, base=base, **told, match="never")
    for name, value in found.state.items():
        torch.testing.assert_close(value, expected.state[name], rtol=1e-5, atol=1e-6)


def test_files_and_modules_agree(tmp_path: Path) -> None:
    import timm

    models = []
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        models.append(timm.create_model("test_vit", num_classes=4, in_chans=1, img_size=32).eval())
        save_file(models[-1].state_dict(), tmp_path / f"{name}.safetensors")
    rows = [{"x": x} for x in torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(0))]
    paths = [tmp_path / f"{n}.safetensors" for n in ("a", "b", "c")]
    images = np.stack([r["x"].numpy() for r in rows])
    np.savez(tmp_path / "data.npz", images=images)
    how = {"data": tmp_path / "data.npz", "match": "never", "weights": (0.2, 0.3, 0.5)}
    for told in ({"method": "regmean"}, {"repair": "repair"}):
        result = mergeid.merge(*paths, output=tmp_path / "o.safetensors", force=True, **how, **told)
        live_result = mergeid.merge(*models, **how, **told)
        found = load_file(tmp_path / "o.safetensors")
        assert set(found) == set(live_result.state) and len(result.report["overridden"]) == len(result.repaired)
        for name, value in found.items():
            torch.testing.assert_close(value, live_result.state[name])


def test_single_examples_of_nested_inputs() -> None:
    batch = {"images": [torch.arange(6).reshape(3, 2), {"depth": torch.arange(3)}], "scale": torch.tensor(2.0)}
    found = list(single_examples(batch))
    assert len(found) == 3
    for i, one in enumerate(found):
        assert one["images"][0].tolist() == [[2 * i, 2 * i + 1]] and one["images"][1]["depth"].tolist() == [i]
        assert float(one["scale"]) == 2
