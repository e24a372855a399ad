"""The same curve from 1, 2 and 3 processes of `accelerate launch`, BatchNorm re-estimation included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluate_worker import curve
from launching import launched

HERE = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def here() -> dict:
    return {size: curve(size, batch_size=17) for size in (None, 10)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_number_of_processes_does_not_show(processes, here, tmp_path):
    output = tmp_path / "curves.json"
    done = launched(processes, [str(HERE / "evaluate_worker.py"), str(output), str(processes)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    for name, size in (("one calibration batch", None), ("many calibration batches", 10), ("read back", None)):
        assert found[name]["losses"] == pytest.approx(here[size]["losses"], rel=1e-9, abs=0), name
        assert found[name]["accuracies"] == here[size]["accuracies"]
        assert found[name]["count"] == 1003
    assert found["resumed"] == found["read back"] == found["one calibration batch"]
