"""Calibration inputs of another kind than the training's: nothing is solved on them unasked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mergeid
from mergeid.results.merge import MergeResult
from mergeid.stages import compare


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return (torch.from_numpy(x).float() - 4.9) / 6, torch.from_numpy(y).long()


class Classifier(nn.Module):
    def __init__(self, seed: int, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norms = [nn.BatchNorm1d(40) if norm else nn.Identity() for _ in range(2)]
        self.body = nn.Sequential(
            nn.Linear(64, 40), norms[0], nn.ReLU(), nn.Linear(40, 40), norms[1], nn.ReLU(), nn.Linear(40, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "BatchNorm"])
def pair(request: pytest.FixtureRequest) -> list[nn.Module]:
    x, y = digits()
    nets: list[nn.Module] = []
    for seed in range(2):
        net = Classifier(seed, request.param)
        optimiser = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(150):
            at = torch.randint(1000, (128,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[at]), y[at]).backward()
            optimiser.step()
        nets.append(net.eval())
    return nets


def inputs(kind: str) -> Tensor:
    own, generator = digits()[0][1000:1256], torch.Generator().manual_seed(0)
    mixed = 3 * own[:, torch.randperm(64, generator=generator)]
    noise = 10 * torch.randn(own.shape, generator=generator)
    return {"own": own, "few": own[:64], "noise": noise, "negative": -3 * own, "mixed": mixed}[kind]


def merged(pair: list[nn.Module], x: Tensor, **how: Any) -> MergeResult:
    said = torch.zeros(len(x), dtype=torch.long)  # that outputs are class scores, not which
    data = [{"x": row, "labels": label} for row, label in zip(x, said, strict=True)]
    return mergeid.merge(*pair, data=data, example_inputs={"x": x[:2], "labels": said[:2]}, force=True, **how)


def without_solving(pair: list[nn.Module], x: Tensor, patch: pytest.MonkeyPatch) -> MergeResult:
    with patch.context() as patched:
        patched.setattr(compare, "can_be_solved", lambda members: False)
        return merged(pair, x)


def test_inputs_of_their_own_kind_are_solved_on(pair: list[nn.Module]) -> None:
    found = merged(pair, inputs("own"))
    assert found.comparison is not None and found.comparison["unlike"] is None
    assert {"regmean", "solve"} <= {name.partition("+")[2] for name in found.comparison["distances"]}
    assert found.comparison["repair"] == "solve"
    assert not [n for n in found.notes if "another kind" in n]


def test_nor_do_few_of_them_seem_to_be_of_another(pair: list[nn.Module]) -> None:
    found = merged(pair, inputs("few")).comparison
    assert found is not None and found["unlike"] is None


@pytest.mark.parametrize("kind", ["mixed", "other"])
def test_on_others_nothing_is_solved_towards_both(
    pair: list[nn.Module], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no merge that leans is nearer, what is written is what is written where nothing can be solved. And it is
    said why, in numbers."""
    norm = any(isinstance(m, nn.BatchNorm1d) for m in pair[0].modules())
    x = inputs(kind if kind == "mixed" else "noise" if norm else "negative")
    found, expected = merged(pair, x), without_solving(pair, x, monkeypatch)
    assert found.comparison is not None and expected.comparison is not None
    distances = dict(found.comparison["distances"])
    leaning = {name for name in distances if name.endswith("+solve+lean")}
    assert {name: value for name, value in distances.items() if name not in leaning} == expected.comparison["distances"]
    assert found.comparison["repair"] in (expected.comparison["repair"], "solve+lean")
    if found.comparison["repair"] != "solve+lean":
        assert found.state is not None and expected.state is not None
        assert all(torch.equal(value, expected.state[key]) for key, value in found.state.items())
    with torch.no_grad():
        said = [net(x).softmax(-1) for net in pair]
    sure = sum(float(p.amax(-1).mean()) for p in said) / 2
    alike = float((said[0].argmax(-1) == said[1].argmax(-1)).double().mean())
    assert found.comparison["unlike"]["sure"] == pytest.approx(sure, abs=1e-6)
    assert found.comparison["unlike"]["alike"] == pytest.approx(alike)
    (note,) = [n for n in found.notes if "another kind" in n]
    assert f"{sure:.0%} sure" in note and f"on {alike:.0%} only" in note and "--repair solve" in note
    assert ("keep to one model" in note) == (found.comparison["repair"] == "solve+lean")
    assert not [n for n in expected.notes if "another kind" in n]


def test_nor_on_inputs_that_are_all_called_by_one_name(pair: list[nn.Module]) -> None:
    """Images of one digit: the models agree about them, whatever they would make of others."""
    x, y = digits()
    found = merged(pair, x[y == 2])
    assert found.comparison is not None and found.comparison["unlike"]["alike"] > 0.95
    assert found.comparison["repair"] != "solve"
    (note,) = [n for n in found.notes if "one and the same class" in n]
    assert "several classes" in note and "--repair solve" in note and "--data a=" not in note


@pytest.mark.parametrize("kind", ["own", "other"])
def test_a_prediction_says_so_too(pair: list[nn.Module], kind: str) -> None:
    """Of every other example, which it is judged on."""
    norm = any(isinstance(m, nn.BatchNorm1d) for m in pair[0].modules())
    x = inputs(kind if kind == "own" else "noise" if norm else "negative")
    said = torch.zeros(len(x), dtype=torch.long)
    data = [{"x": row, "labels": label} for row, label in zip(x, said, strict=True)]
    found = mergeid.predict(*pair, data=data, example_inputs={"x": x[:2], "labels": said[:2]})
    notes = [n for n in found.notes if "another kind" in n]
    assert len(notes) == (kind == "other")
    with torch.no_grad():
        named = [net(x[::2]).argmax(-1) for net in pair]
    assert all(f"on {(named[0] == named[1]).double().mean():.0%} only" in n for n in notes)


def trained(net: nn.Module, x: Tensor, y: Tensor, rate: float, steps: int = 150) -> nn.Module:
    torch.manual_seed(4)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    for _ in range(steps):
        at = torch.randint(len(x), (128,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[at]), y[at]).backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def fine_tunes() -> tuple[list[nn.Module], Tensor]:
    """Of one network, on digits and on the same lying on their side; and inputs of both kinds."""
    x, y = digits()
    turned = x.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    base = trained(Classifier(0, False), x[:1000], y[:1000], 5e-3)
    nets = [trained(copy.deepcopy(base), own[:1000], y[:1000], 1e-3) for own in (x, turned)]
    return nets, torch.cat([x[1000:1128], turned[1000:1128]])


def test_fine_tunes_that_are_sure_of_different_answers_are_averaged(
    fine_tunes: tuple[list[nn.Module], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    nets, x = fine_tunes
    found, expected = merged(nets, x), without_solving(nets, x, monkeypatch)
    assert found.comparison is not None and expected.comparison is not None
    with torch.no_grad():
        said = torch.stack([net(x).double().softmax(-1) for net in nets])
    apart = (said * (said / said.mean(0)).log()).sum(-1).mean()
    assert found.comparison["apart"] == pytest.approx(float(apart), rel=1e-4) and apart > 0.15
    assert found.comparison["distances"] == expected.comparison["distances"]
    assert found.state is not None and expected.state is not None
    assert all(torch.equal(value, expected.state[key]) for key, value in found.state.items())
    (note,) = [n for n in found.notes if "no merge was solved" in n.lower()]
    assert "--data a=" in note and "--repair solve" in note
    asked = merged(nets, x, repair="solve")
    assert asked.repair is not None and asked.repair["kind"] == "solve"


def test_nor_are_they_rescaled_where_they_agree_about_nothing() -> None:
    """One of two fine-tunes calls every digit by the next one's name."""
    x, y = digits()
    base = trained(Classifier(1, False), x[:1000], y[:1000], 5e-3)
    nets = [trained(copy.deepcopy(base), x[:1000], (y[:1000] + k) % 10, 1e-3, 300) for k in range(2)]
    found = merged(nets, x[1000:1256]).comparison
    assert found is not None and found["apart"] > 0.15 and found["unlike"]["alike"] < 0.1
    assert found["distances"]["plain+repair"] < found["distances"]["plain"] and found["repair"] == "none"
    assert found["distance"] == pytest.approx(found["distances"][found["chosen"]])


def test_others_are_solved(fine_tunes: tuple[list[nn.Module], Tensor], pair: list[nn.Module]) -> None:
    """Networks from independent seeds, and fine-tunes on inputs of which both know the answers."""
    nets, x = fine_tunes
    assert (merged(nets, x[:128]).comparison or {})["apart"] is None
    found = merged(pair, inputs("own")).comparison
    assert found is not None and found["apart"] is None and found["repair"] == "solve"


def test_whoever_asks_for_it_has_it_solved(pair: list[nn.Module]) -> None:
    found = merged(pair, inputs("mixed"), repair="solve")
    assert found.repair is not None and found.repair["kind"] == "solve"
    assert found.comparison is not None and found.comparison["unlike"] is None


@pytest.mark.parametrize("target", ["own", "mean"])
def test_each_models_own_inputs_are_not_asked_about(pair: list[nn.Module], target: str) -> None:
    """Models of different tasks need not agree on each other's inputs."""
    x = inputs("mixed")
    rows = [{"x": row, "labels": torch.tensor(0)} for row in x]
    example = {"x": x[:2], "labels": torch.zeros(2, dtype=torch.long)}
    data = {"a": rows[::2], "b": rows[1::2]}
    found = mergeid.merge(*copy.deepcopy(pair), data=data, example_inputs=example, target=target, force=True)
    assert found.comparison is not None and found.comparison["unlike"] is None
