"""The table of methods: a second run measures nothing again, and the table says what was measured."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "methods" / "reproduce.py"


def images(folder: Path) -> None:
    """Ten classes of noisy patterns, in the format of Fashion-MNIST."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 28, 28))
    for split, count in (("train", 8000), ("t10k", 2000)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        pixels = (0.5 * patterns[labels] + 0.5 * rng.integers(0, 256, (count, 28, 28))).astype(np.uint8)
        for kind, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes(), 1))


@pytest.mark.slow
def test_runs_resumes_and_reports(tmp_path: Path) -> None:
    images(tmp_path)
    table = tmp_path / "table.md"
    command = [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    command += ["--table", str(table), "--only", "fine-tunes"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(rows) == first.stdout.count("fine-tunes/") == 13
    assert all(0 <= v <= 1 for row in rows.values() for v in row.values())
    written = table.read_text()
    assert f"| linear | {100 * rows['fine-tunes/linear']['accuracy']:.1f} % |" in written
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == ""
    assert table.read_text() == written


def test_missing_data_is_said(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "apt-get install dataset-fashion-mnist" in found.stderr
    assert "Traceback" not in found.stderr


def test_runs_are_summed_up_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import fine_tunes
    import reproduce

    rng = np.random.default_rng(0)
    runs = [{"linear": float(x), "ties": float(y)} for x, y in rng.uniform(0.5, 0.9, (5, 2))]
    found = fine_tunes.summed_up(runs, "linear")
    gaps = np.array([r["ties"] - r["linear"] for r in runs])
    assert found["ties"]["gap"] == pytest.approx(gaps.mean())
    assert found["ties"]["error"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(5))
    assert set(found["linear"]) == {"accuracy"}
    written = reproduce.table({f"tasks/{k}": v for k, v in found.items()})
    assert "| | accuracy | against linear, points |" in written
    assert f"{100 * gaps.mean():+.2f} ± {100 * found['ties']['error']:.2f} |" in written


def test_own_classes_are_the_five_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import fine_tunes

    logits = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 20
    own, label = fine_tunes.own_classes(logits, y)
    for i in range(30):
        task = int(y[i]) // 5
        assert torch.equal(own[i], logits[i, 5 * task : 5 * task + 5])
        assert own[i, label[i]] == logits[i, y[i]]
    logits.requires_grad_(True)
    fine_tunes.own_loss(logits, torch.full((30,), 7)).backward()  # other tasks' classes are not trained
    assert logits.grad is not None
    assert logits.grad.abs().sum(0).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_own_heads_are_those_of_the_fine_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import fine_tunes
    import networks

    merged, *tuned = (networks.seeded(networks.perceptron, s, width=8, classes=10) for s in range(3))
    x = torch.randn(6, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    features = merged[:-1](x)
    expected = torch.cat([tuned[0][-1](features)[:, :5], tuned[1][-1](features)[:, 5:]], 1)
    torch.testing.assert_close(fine_tunes.with_heads(merged, tuned)(x), expected)


def test_blocks_of_other_sets_use_their_own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import common
    import reproduce

    images(tmp_path)
    bench = common.Bench(tmp_path, tmp_path)
    other = reproduce.AGAINST["five"]

    def measure(bench: common.Bench, i: int) -> dict[str, float]:
        return {"cycle": i / 100, other: 0.0}

    reproduce.many_runs(bench, "five", measure)
    reproduce.many_runs(bench, "five, other sets", measure, first=reproduce.RUNS, of="five")
    assert bench.rows["five/cycle"]["accuracy"] == pytest.approx(0.02)
    assert bench.rows["five, other sets/cycle"]["accuracy"] == pytest.approx(0.07)
    written = reproduce.table(bench.rows)
    assert written.index("| cycle | 2.0 %") < written.index("| cycle | 7.0 %")
