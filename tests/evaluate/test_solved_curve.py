"""The curve of solved merges: at every point what `merge --repair solve` makes there."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import mergeid

POINTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks and labelled inputs, some for each purpose."""
    path = tmp_path_factory.mktemp("solved")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_byobnet", num_classes=3, in_chans=1)
        save_file(model.state_dict(), path / f"{name}.safetensors", metadata={"architecture": "timm/test_byobnet"})
    random = np.random.default_rng(0)
    for name, count in (("test", 40), ("calibration", 64)):
        x = random.normal(size=(count, 1, 32, 32)).astype("float32")
        np.savez(path / f"{name}.npz", x=x, labels=np.arange(count) % 3)
    return path


def options(folder: Path) -> dict[str, str]:
    return {
        "arch": "timm/test_byobnet",
        "data": str(folder / "test.npz"),
        "calibration": str(folder / "calibration.npz"),
    }


@pytest.mark.parametrize("match", ["never", pytest.param("always", marks=pytest.mark.slow)])
def test_every_point_is_a_solved_merge(folder: Path, tmp_path: Path, match: str) -> None:
    a, b = (str(folder / f"{name}.safetensors") for name in "ab")
    found = mergeid.barrier(a, b, **options(folder), match=match, solve=True, points=POINTS, device="cpu")
    assert found.solved and [c.label for c in found.beside] == (
        ["direct"] if match == "never" else ["direct", "matched"]
    )
    plain = mergeid.barrier(a, b, **options(folder), match=match, points=POINTS, device="cpu")
    assert found.beside[-1].losses == plain.losses and found.losses[0] == plain.losses[0]
    x = np.load(folder / "test.npz")
    model = timm.create_model("test_byobnet", num_classes=3, in_chans=1).eval()
    for k in range(1, POINTS - 1):
        share = found.lambdas[k]
        made = tmp_path / f"{k}.safetensors"
        mergeid.merge(
            a, b, output=made, data=str(folder / "calibration.npz"), arch="timm/test_byobnet", match=match,
            repair="solve", weights=[1 - share, share], force=True,
        )  # fmt: skip
        model.load_state_dict(load_file(made))
        with torch.no_grad():
            loss = F.cross_entropy(model(torch.from_numpy(x["x"])), torch.from_numpy(x["labels"]))
        assert found.losses[k] == pytest.approx(float(loss), abs=2e-5)


def test_a_pair_with_itself_stays_itself(folder: Path) -> None:
    a = str(folder / "a.safetensors")
    found = mergeid.barrier(a, a, **options(folder), solve=True, points=3, device="cpu")
    assert found.barrier < 1e-6 and found.barrier_accuracy == 0


def test_the_curves_beside_are_kept_as_json(folder: Path, tmp_path: Path) -> None:
    a, b = (str(folder / f"{name}.safetensors") for name in "ab")
    resume = tmp_path / "points.json"
    found = mergeid.barrier(a, b, **options(folder), solve=True, points=3, resume=resume, device="cpu")
    assert type(found).from_json(copy.deepcopy(found.to_json())) == found
    again = mergeid.barrier(a, b, **options(folder), solve=True, points=3, resume=resume, device="cpu")
    assert again == found
