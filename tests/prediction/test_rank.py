"""Partners for a model: the order, the matrix, folders, and candidates that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_predict import DATA, X, trained
from torch import nn

import mergeid as m
from mergeid.errors import MergeidError
from mergeid.results.ranking import Ranking
from mergeid.verbs.rank import models_in, names_of

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
    scores = [p.way.nats.score for p in found.partners]
    assert scores == sorted(scores) and found.advice.startswith("Merge model 1 (A) with model 4 (B), direct")
    json.dumps(found.to_json())


def test_trials_decide_where_there_are_any(nets: dict[str, nn.Module]) -> None:
    found = m.rank(list(nets.values()), trial=True, **HOW)
    assert isinstance(found, Ranking)
    tried = [p.tried for p in found.partners]
    assert None not in tried and tried == sorted(tried, key=float)
    for p in found.partners:
        assert p.tried == min(t.soft for t in p.result.trials)


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
