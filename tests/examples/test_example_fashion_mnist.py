"""The example as a user runs it, on few images."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist.py"
SMALL = ["--images", "256", "--epochs", "1", "--calibration", "64", "--test", "100", "--points", "3", "--threads", "1"]


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True)


def test_missing_data_says_how_to_install_it(tmp_path):
    done = run("--out", str(tmp_path), "--data", str(tmp_path))
    assert done.returncode == 1 and "apt-get install dataset-fashion-mnist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").exists(), reason="dataset-fashion-mnist")
def test_from_training_to_the_report(tmp_path):
    done = run("--out", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["scores"]) == ["a", "b", "direct", "always match", "mergeid", "default"]
    assert report["barriers"][0]["repair"] and report["barriers"][0]["count"] == 100
    # The merge on disk and the middle of the line are the same network, if the statistics of both are measured on the
    # calibration images alone (`merge` holds those of few images together with what was stored).
    example = runpy.run_path(str(EXAMPLE))
    test_set, calibration = (example["Images"](example["DATA"], s, stop=n) for s, n in (("t10k", 100), ("train", 64)))
    for curve, mode in zip(report["barriers"], ("never", "always"), strict=False):
        again = example["score"](tmp_path / f"{mode}-none.safetensors", test_set, calibration)
        assert again.loss == pytest.approx(curve["losses"][1], rel=1e-4)
    assert (tmp_path / "barrier.png").exists()

    trained = [(tmp_path / f"{name}.safetensors").stat().st_mtime_ns for name in "ab"]
    again = run("--out", str(tmp_path), *SMALL)
    assert again.stdout.count("is there already") == 2
    assert [(tmp_path / f"{name}.safetensors").stat().st_mtime_ns for name in "ab"] == trained
    assert json.loads((tmp_path / "report.json").read_text()) == report
    other = run("--out", str(tmp_path), *SMALL, "--epochs", "2")
    assert other.returncode == 1 and "was trained with other options" in other.stderr
