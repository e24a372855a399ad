"""``mergeid demo``, the real command, start to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import mergeid
from safetensors.torch import load_file

NAMES = ("a.safetensors", "b.safetensors", "merged.safetensors", "direct.safetensors", "barrier.png", "demo.json")


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    done = mergeid("demo", cwd=tmp_path)
    assert done.code == 0 and done.lines == [], done.stderr
    folder = tmp_path / "mergeid-demo"
    assert all((folder / name).is_file() and name in done.stdout for name in NAMES)
    assert max(len(line) for line in done.stdout.splitlines() if "mergeid-demo/" not in line) <= 80
    found = json.loads((folder / "demo.json").read_text())
    a, b, plain, renewed, matched, ours = found["networks"]
    assert [n["name"] for n in found["networks"][2:]] == ["plain average", "plain average", "matched", "mergeid"]
    assert min(a["accuracy"], b["accuracy"]) > 0.95
    assert renewed["accuracy"] + 0.2 < matched["accuracy"] < ours["accuracy"] + 0.02
    assert ours["after"] == "solved layer by layer"
    assert ours["loss"] < 0.5 * matched["loss"] < 0.25 * renewed["loss"] < plain["loss"]
    # The middles of the measured lines are the files that were written.
    for curve, network in zip(found["barriers"], (plain, renewed, matched), strict=True):
        assert curve["losses"][5] == pytest.approx(network["loss"], rel=1e-4)

    weights = (folder / "a.safetensors").stat().st_mtime_ns
    again = json.loads(mergeid("demo", "--json", cwd=tmp_path).stdout)
    assert again["reused"] and (folder / "a.safetensors").stat().st_mtime_ns == weights
    assert [n["loss"] for n in again["networks"]] == [n["loss"] for n in found["networks"]]


def test_demo_touches_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    done = mergeid("demo", "-o", "mine", cwd=tmp_path)
    assert done.code == 2 and done.written == [] and "mine holds files that are not from" in done.lines[0]
    done = mergeid("demo", "-o", "mine/thesis.tex", "--force", cwd=tmp_path)
    assert done.code == 2 and done.written == [] and "is a file" in done.lines[0]


def test_digits() -> None:
    from mergeid.verbs.demo import SIDE, TRAINING, load_digits

    digits = load_digits()
    assert digits.train_x.shape == (TRAINING, 1, SIDE, SIDE) and len(digits.test_x) == 500
    assert digits.train_x.min() == -1 and digits.train_x.max() == 1
    assert set(digits.test_y) == set(range(10))


def test_training_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two networks trained side by side are those trained one after the other."""
    from mergeid.verbs import demo

    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "STEPS", 2)
    digits = demo.load_digits()
    digits.train_x, digits.train_y = digits.train_x[:128], digits.train_y[:128]
    seen: list[tuple[str, int, int]] = []
    with demo.one_thread():
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            place = demo._Folder(tmp_path / name)
            assert not place.networks({"a": 1, "b": 2}, digits, lambda *told: seen.append(told), force=False)
            assert place.networks({"a": 1, "b": 2}, digits, lambda *told: seen.append(told), force=False)
    assert seen[-1][1:] == (4, 4) and len(seen) == 8
    first, second, other = (
        load_file(tmp_path / p) for p in ("one/a.safetensors", "two/a.safetensors", "one/b.safetensors")
    )
    assert all(first[k].equal(second[k]) for k in first)
    assert not first["fc.weight"].equal(other["fc.weight"])
