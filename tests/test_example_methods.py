"""The table of methods: a second run measures nothing again, and the table says what was measured."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "methods" / "reproduce.py"


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
