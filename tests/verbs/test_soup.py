"""Soups: chosen on validation data, or with coefficients learned without labels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergeid
from mergeid import MergeidError

NAME = {"model_name": "test_vit", "img_size": 32, "num_classes": 3, "patch_size": 16}


def _model(state: dict[str, Tensor] | None = None) -> Any:
    options = {k: v for k, v in NAME.items() if k != "model_name"}
    model = timm.create_model(str(NAME["model_name"]), **options).eval()
    if state is not None:
        model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, four noisy fine-tunes of its, one of them ruined, and data that the base labels."""
    folder, g = tmp_path_factory.mktemp("soup"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = _model().state_dict()
    paths = []
    for i, noise in enumerate((0.3, 0.6, 5.0, 0.4)):
        tuned = {k: t + noise * t.std(correction=0) * torch.randn(t.shape, generator=g) for k, t in base.items()}
        paths.append(folder / f"{i}.safetensors")
        save_file(tuned, paths[-1])
    save_file(base, folder / "base.safetensors")
    x = torch.randn(60, 3, 32, 32, generator=g)
    with torch.no_grad():
        labels = _model(base)(x).argmax(1)
    return {"folder": folder, "paths": paths, "base": base, "x": x, "labels": labels, "data": (x, labels)}


def _accuracy(case: dict[str, Any], state: dict[str, Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        logits = _model(state)(case["x"])
    loss = torch.nn.functional.cross_entropy(logits.double(), case["labels"])
    return float((logits.argmax(1) == case["labels"]).double().mean()), float(loss)


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([s[k].double() for s in states]).mean(0).float() for k in states[0]}


def test_greedy_soup_is_what_a_plain_loop_chooses(case: dict[str, Any], tmp_path: Path) -> None:
    """The paper's recipe, written down once more: sorted by accuracy, kept where the average is not worse."""
    states = [load_file(p) for p in case["paths"]]
    alone = [_accuracy(case, s) for s in states]
    order = sorted(range(4), key=lambda i: (-alone[i][0], alone[i][1]))
    kept, best = order[:1], alone[order[0]][0]
    for i in order[1:]:
        found = _accuracy(case, _mean([states[j] for j in [*kept, i]]))[0]
        if found >= best:
            kept, best = [*kept, i], found
    result = mergeid.soup(case["paths"], data=case["data"], output=tmp_path / "out.safetensors", match="never")
    assert {i for i, one in enumerate(result.ingredients) if one.kept} == set(kept)
    assert result.accuracy == pytest.approx(best) and result.accuracy >= max(a for a, _ in alone)
    for i, one in enumerate(result.ingredients):
        assert (one.accuracy or 0.0, one.loss) == pytest.approx(alone[i], abs=1e-5)
    for key, value in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(value, _mean([states[j] for j in kept])[key], rtol=0, atol=1e-6)


def test_uniform_soup_is_the_average_of_all(case: dict[str, Any], tmp_path: Path) -> None:
    states = [load_file(p) for p in case["paths"]]
    result = mergeid.soup(
        case["paths"], data=case["data"], how="uniform", output=tmp_path / "out.safetensors", match="never"
    )
    for key, value in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(value, _mean(states)[key], rtol=0, atol=1e-6)
    assert (result.accuracy or 0.0, result.loss) == pytest.approx(_accuracy(case, _mean(states)), abs=1e-5)


def test_scrambled_fine_tunes_are_aligned_first(case: dict[str, Any], tmp_path: Path) -> None:
    moved = tmp_path / "moved.safetensors"
    mergeid.scramble(case["paths"][1], output=moved, seed=4)
    out = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for second, target in zip((case["paths"][1], moved), out, strict=True):
        mergeid.soup([case["paths"][0], second], data=case["data"], how="uniform", output=target, match="always")
    one, two = map(load_file, out)
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6


def test_adamerging_makes_predictions_sure_and_writes_what_it_learned(case: dict[str, Any], tmp_path: Path) -> None:
    """The entropy that it reports is that of the written file, and lower than with the coefficients it began with."""

    def entropy(state: dict[str, Tensor]) -> float:
        with torch.no_grad():
            chances = _model(state)(case["x"]).log_softmax(1)
        return float(-(chances.exp() * chances).sum(1).mean())

    paths, base = case["paths"][:2], case["base"]
    entropies = []
    for steps in (1, 30):
        out = tmp_path / f"{steps}.safetensors"
        result = mergeid.soup(
            paths,
            data=case["data"],
            how="adamerging",
            base=case["folder"] / "base.safetensors",
            steps=steps,
            output=out,
            match="never",
            batch_size=60,
        )
        assert result.entropy is not None
        assert result.entropy[1] == pytest.approx(entropy(load_file(out)), abs=1e-5)
        began = {k: t + 0.3 * sum(load_file(p)[k] - t for p in paths) for k, t in base.items()}
        assert result.entropy[0] == pytest.approx(entropy(began), abs=1e-5)
        entropies += [result.entropy[0], result.entropy[1]]
    assert all(a >= b for a, b in pairwise(dict.fromkeys(entropies)))
    assert all(0 <= one.coefficient <= 1 for one in result.ingredients)


def test_soup_of_one_and_adamerging_without_base_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(MergeidError, match="two models"):
        mergeid.soup(case["paths"][:1], data=case["data"])
    with pytest.raises(MergeidError, match="needs --base"):
        mergeid.soup(case["paths"], data=case["data"], how="adamerging")


def test_adamerging_runs_each_task_with_its_own_head(case: dict[str, Any], tmp_path: Path) -> None:
    """Adam's first step is the rate times the sign of the gradient, here of the mean of both tasks' entropies, each on
    its own inputs through its own head, which plain autograd gives."""
    base, states = case["base"], [dict(load_file(p)) for p in case["paths"][:2]]
    paths, data, inputs = [], {}, []
    for i, state in enumerate(states):
        g = torch.Generator().manual_seed(10 + i)
        state |= {k: torch.randn(t.shape, generator=g) for k, t in state.items() if k.startswith("head.")}
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(state, paths[-1])
        inputs.append(torch.randn(20 + 10 * i, 3, 32, 32, generator=g))
        data["ab"[i]] = str(tmp_path / f"{i}.npz")
        np.savez(data["ab"[i]], x=inputs[-1].numpy())
    keys = [k for k in base if not k.startswith("head.")]
    learned = {k: torch.full((2,), 0.3, requires_grad=True) for k in keys}

    def entropy() -> Tensor:
        trunk = {k: base[k] + sum(learned[k][i] * (states[i][k] - base[k]) for i in range(2)) for k in keys}
        found = []
        for state, x in zip(states, inputs, strict=True):
            own = {k: t for k, t in state.items() if k not in keys}
            chances = torch.func.functional_call(_model(), {**trunk, **own}, (x,)).log_softmax(1)
            found.append(-(chances.exp() * chances).sum(1).mean())
        return sum(found) / 2  # type: ignore[return-value]

    before = entropy()
    before.backward()
    result = mergeid.soup(
        paths, data=data, how="adamerging", base=case["folder"] / "base.safetensors", steps=1, batch_size=40,
        skip=["head.*"], output=tmp_path / "out.safetensors", match="never",
    )  # fmt: skip
    assert result.entropy is not None and result.entropy[0] == pytest.approx(before.item(), abs=1e-5)
    merged = load_file(tmp_path / "out.safetensors")
    for k in keys:
        step = [0.3 - 1e-3 * float(learned[k].grad[i].sign()) for i in range(2)]  # type: ignore[index]
        expected = base[k] + sum(step[i] * (states[i][k] - base[k]) for i in range(2))
        torch.testing.assert_close(merged[k], expected, rtol=1e-5, atol=2e-6)
    assert all(torch.equal(merged[k], t) for k, t in states[0].items() if k not in keys)
    with torch.no_grad():
        for k in keys:
            learned[k] -= 1e-3 * learned[k].grad.sign()  # type: ignore[union-attr]
    assert result.entropy[1] == pytest.approx(entropy().item(), abs=1e-5)


def test_own_data_is_for_every_model(case: dict[str, Any]) -> None:
    with pytest.raises(MergeidError, match="names 2 models, and the soup has 3"):
        mergeid.soup(case["paths"][:3], data={"a": case["x"], "b": case["x"]})


def test_adamerging_of_half_precision_models_on_a_wide_base(case: dict[str, Any], tmp_path: Path) -> None:
    """It learns in the number format of the models; a class that a network rules out does not spoil the entropy."""
    paths = []
    for i, path in enumerate(case["paths"][:2]):
        state = load_file(path)
        state["head.bias"][2] = -1e30  # as good as ruled out
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, paths[-1])
    result = mergeid.soup(
        paths,
        data=case["data"],
        how="adamerging",
        base=case["folder"] / "base.safetensors",
        steps=3,
        output=tmp_path / "out.safetensors",
        match="never",
    )
    assert result.entropy is not None and all(np.isfinite(result.entropy))
    assert all(0 <= one.coefficient <= 1 for one in result.ingredients)


class Spectral(torch.nn.Module):
    """A classifier with a complex weight, and a head that is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 8)
        self.filter = torch.nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.head = torch.nn.Linear(8, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        mixed: Tensor = torch.fft.ifft(torch.fft.fft(self.embed(ids)) * self.filter).real
        return self.head(mixed).mean(1)  # type: ignore[no-any-return]


def test_adamerging_moves_complex_and_tied_weights() -> None:
    """With so small steps the coefficients stay where they began: every tensor is the base with 0.3 of each task."""
    torch.manual_seed(0)
    base, one, two = Spectral().eval(), Spectral().eval(), Spectral().eval()
    ids, labels = torch.randint(0, 6, (12, 4)), torch.randint(0, 6, (12,))
    result = mergeid.soup(
        [one, two],
        data=[{"ids": i, "labels": n} for i, n in zip(ids, labels, strict=True)],
        how="adamerging",
        base=base,
        steps=1,
        match="never",
        example_inputs={"ids": ids[:2]},
    )
    assert result.state is not None
    states = [m.state_dict() for m in (base, one, two)]
    for key, value in result.state.items():
        wanted = states[0][key] + 0.3 * sum(s[key] - states[0][key] for s in states[1:])
        torch.testing.assert_close(value, wanted, rtol=1e-2, atol=1e-2)
