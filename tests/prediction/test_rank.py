"""Partners for a model: the order, the matrix, folders, and candidates that do not fit."""

from __future__ import annotations

import copy
import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_predict import DATA, X, labels, trained
from torch import nn

import mergeid as m
import mergeid.models.examples as examples
from mergeid.commands.rank import _next
from mergeid.commands.terminal import Call
from mergeid.errors import MergeidError
from mergeid.reporting.predictions import ranking_table
from mergeid.results.ranking import Ranking
from mergeid.verbs.rank import models_in, names_of, rank

HOW = {"data": DATA, "example_inputs": X[:2]}


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    base = trained(0)
    return {"a": trained(1, 20, base), "far": trained(3, 80), "near": trained(2, 20, base)}


def test_the_nearest_comes_first(nets: dict[str, nn.Module]) -> None:
    """Each as `predict` has it; a model of another shape is named, and does not end the work."""
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    found = m.rank([*nets.values(), copy.deepcopy(nets["a"]), other], **HOW)
    assert isinstance(found, Ranking)
    assert [p.name for p in found.partners] == ["model 4", "model 3", "model 2"]
    assert [name for name, _ in found.failed] == ["model 5"]
    for p, name in zip(found.partners[1:], ("near", "far"), strict=True):
        alone = m.predict(nets["a"], nets[name], **HOW)
        for one, two in zip(p.result.outlooks, alone.outlooks, strict=True):
            assert one.nats.expected == pytest.approx(two.nats.expected, rel=1e-5, abs=1e-8)
    scores = [p.beyond for p in found.partners]
    assert None not in scores and scores == sorted(scores, key=float)
    assert {p.name: p.beyond for p in found.partners}["model 4"] == pytest.approx(0, abs=1e-9)  # its own copy
    assert found.best.name == "model 3" and found.gains_nothing
    assert found.advice.startswith("Nothing is gained: even the best merge, model 1 (A) with model 3 (B), ")
    assert found.advice.endswith(" model 4 computes the same as model 1 (A).")
    json.dumps(found.to_json())


def moved(net: nn.Module) -> nn.Module:
    """The same function, its hidden neurons in another order."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p, axis in ((net[0].weight, 0), (net[0].bias, 0), (net[2].weight, 1)):  # type: ignore[index]
            p.copy_(p.flip(axis))
    return net


@pytest.mark.parametrize("given", [{"data": DATA}, {"data": DATA, "trial": True}, {}])
def test_nothing_is_gained_by_a_merge_with_oneself(nets: dict[str, nn.Module], given: dict[str, object]) -> None:
    """Neither with a copy nor with the same neurons in another order."""
    call = Call(rank, inspect.signature(rank).bind_partial())
    a = nets["a"]
    for others, whom in (([a], "model 2 (B) computes"), ([copy.deepcopy(a), moved(a)], "all candidates compute")):
        found = m.rank([a, *others], example_inputs=X[:2], **given)
        assert isinstance(found, Ranking) and found.gains_nothing
        assert found.advice == f"Nothing is gained by a merge: {whom} the same as model 1 (A)."
        assert _next(found, call, ["a", "b"]) is None


def test_nothing_is_advised_of_a_collapsed_partner(nets: dict[str, nn.Module]) -> None:
    """One that says the same of every input; its merges may seem to gain in a trial, and come last all the same."""
    dead = copy.deepcopy(nets["a"])
    with torch.no_grad():
        dead[2].weight.zero_()  # type: ignore[index, union-attr, operator]
        dead[2].bias.copy_(torch.tensor([9.0, 0, 0, 0]))  # type: ignore[index, union-attr, operator]
    call = Call(rank, inspect.signature(rank).bind_partial(data="d", trial=True))
    found = m.rank([nets["a"], dead], trial=True, **HOW)
    assert isinstance(found, Ranking) and found.advice.startswith("Cannot tell: one of the models makes the same")
    assert _next(found, call, ["a", "b"]) is None
    both = m.rank([nets["a"], dead, nets["near"]], trial=True, **HOW)
    assert isinstance(both, Ranking) and [p.name for p in both.partners] == ["model 3", "model 2"]


@pytest.fixture(scope="module")
def elsewhere(nets: dict[str, nn.Module]) -> nn.Module:
    """Of the same start, sure of wrong classes: a merge with it loses less than the mean of the two."""
    net = copy.deepcopy(trained(0))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    generator = torch.Generator().manual_seed(9)
    for _ in range(40):
        x = torch.randn(64, 6, generator=generator)
        loss = nn.functional.cross_entropy(net(x), (labels(x) + 1) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("given", [{"data": DATA}, {"data": DATA, "trial": True}, {}])
def test_the_merged_network_counts_not_the_line(
    nets: dict[str, nn.Module], elsewhere: nn.Module, given: dict[str, object]
) -> None:
    """A bad partner comes last, however little its merge loses against the mean of both."""
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(6))

    @torch.no_grad()
    def loss(net: nn.Module) -> float:
        return float(nn.functional.cross_entropy(net(x), labels(x)))

    merged = [copy.deepcopy(nets["a"]) for _ in range(2)]
    for net, b in zip(merged, (nets["near"], elsewhere), strict=True):
        with torch.no_grad():
            for p, q in zip(net.parameters(), b.parameters(), strict=True):
                p.copy_((p + q) / 2)
    pairs = zip(merged, (nets["near"], elsewhere), strict=True)
    line = [loss(n) - (loss(nets["a"]) + loss(b)) / 2 for n, b in pairs]
    assert line[1] < line[0] < 0.01 and loss(merged[1]) > loss(merged[0]) + 0.2
    found = m.rank([nets["a"], elsewhere, nets["near"]], example_inputs=X[:2], **given)
    assert isinstance(found, Ranking) and [p.name for p in found.partners] == ["model 3", "model 2"]
    near, far = (p.beyond for p in found.partners)
    assert near is not None and far is not None and near < 0.02 < 0.1 < far
    alone = m.rank([nets["a"], elsewhere], example_inputs=X[:2], **given)
    assert isinstance(alone, Ranking)
    told = alone.partners[0].trial is not None or alone.partners[0].way.nats.trusted
    assert alone.advice.startswith("Nothing is gained" if told else "Cannot tell")


def test_labels_say_what_a_candidate_is_worth(nets: dict[str, nn.Module], elsewhere: nn.Module) -> None:
    """What B loses beyond A is measured on the examples of the trial, where they have labels."""
    given = [{"arg0": x, "labels": y} for x, y in zip(X, labels(X), strict=True)]
    found = m.rank([nets["a"], elsewhere, nets["near"]], data=given, trial=True, example_inputs=X[:2])
    assert isinstance(found, Ranking) and [p.name for p in found.partners] == ["model 3", "model 2"]
    half = slice(1, None, 2)
    for p, b in zip(found.partners, (nets["near"], elsewhere), strict=True):
        assert p.trial is not None and (known := p.trial.labelled) is not None and known.examples == 100
        with torch.no_grad():
            both = [nn.functional.cross_entropy(n(X[half]), labels(X)[half]) for n in (nets["a"], b)]
        assert known.behind == pytest.approx(float(both[1] - both[0]), abs=1e-5)
        assert p.beyond == pytest.approx(known.corrected + known.behind / 2)


def test_the_data_is_read_once(monkeypatch: pytest.MonkeyPatch, nets: dict[str, nn.Module]) -> None:
    count, made = [0], examples.examples_of

    def counted(*given: object, **more: object) -> object:
        count[0] += 1
        return made(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(examples, "examples_of", counted)
    m.rank(list(nets.values()), **HOW)
    assert count[0] == 1


def test_trials_decide_where_there_are_any(nets: dict[str, nn.Module]) -> None:
    found = m.rank(list(nets.values()), trial=True, **HOW)
    assert isinstance(found, Ranking)
    beyond = [p.beyond for p in found.partners]
    assert None not in beyond and beyond == sorted(beyond, key=float)
    for p in found.partners:
        assert p.beyond == min(t.beyond for t in p.result.trials)
        assert p.trial is not None and p.tried == p.trial.soft and p.label == p.trial.label


def test_the_table_explains_the_columns_that_it_has(nets: dict[str, nn.Module]) -> None:
    found = m.rank(list(nets.values()), **HOW)
    assert isinstance(found, Ranking) and any(p.way.points is not None for p in found.partners)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ranking_table(found, width=120))
    assert "points:" not in console.export_text()


@pytest.mark.parametrize("words", [{}, {"data": "d"}, {"data": "d", "trial": True}])
def test_nothing_gained_is_followed_by_no_merge(nets: dict[str, nn.Module], words: dict[str, object]) -> None:
    """But by a closer look, as far as there is one."""
    call = Call(rank, inspect.signature(rank).bind_partial(**words))
    how = {**HOW, "trial": True} if words.get("trial") else HOW
    found = m.rank([nets["near"], nets["far"]], tolerate=0.0, **how)
    assert isinstance(found, Ranking) and found.gains_nothing and found.advice.startswith("Nothing is gained")
    printed = _next(found, call, ["a", "b"])
    if words.get("trial"):
        assert printed is None
    else:
        assert printed is not None and "mergeid rank a b" in printed
        assert printed.endswith("--try" if words else "--data DATA")


def test_every_pair(nets: dict[str, nn.Module]) -> None:
    found = m.rank(list(nets.values()), every=True, **HOW)
    assert not isinstance(found, Ranking)
    values = np.array(found.expected())
    assert values.shape == (3, 3) and (values == values.T).all() and (np.diag(values) == 0).all()
    row = m.rank(list(nets.values()), **HOW)
    assert isinstance(row, Ranking)
    assert {p.name: p.result.best.nats.expected for p in row.partners} == pytest.approx(
        {"model 2": values[0, 1], "model 3": values[0, 2]}
    )


def test_folders_of_models(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(2)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
    save_file(weights, tmp_path / "three.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    inside = models_in(tmp_path)
    assert inside == [tmp_path / n for n in ("one", "three.safetensors", "two")]
    assert models_in(tmp_path / "one") == [tmp_path / "one"] and models_in("org/name") == ["org/name"]
    assert names_of([tmp_path / "one", "org/one", X]) == [str(tmp_path / "one"), "org/one", "model 3"]
    assert names_of(inside) == ["one", "three.safetensors", "two"]


def test_bad_input(nets: dict[str, nn.Module]) -> None:
    for alone in ([nets["a"]], nets["a"], "no/such-model"):
        with pytest.raises(MergeidError, match="a single model has no partner"):
            m.rank(alone, **HOW)
    for name in ("a\0b", "x" * 300, "\ud800"):
        with pytest.raises(MergeidError):
            m.rank([name, name])
    with pytest.raises(MergeidError, match="none of the candidates"):
        m.rank([nets["a"], nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()], **HOW)
    with pytest.raises(MergeidError, match="--tolerate"):
        m.rank(list(nets.values()), tolerate=-1, **HOW)
