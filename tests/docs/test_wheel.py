"""The wheel holds what mergeid needs and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_contents_and_size(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip("pip cannot get hatchling, which builds the wheel")
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    beside_code = [i for i in archive.infolist() if not i.filename.endswith(".py")]
    assert sum(i.compress_size for i in beside_code) <= 700_000
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {
        "mergeid",
        *(
            f"mergeid_{library}"
            for library in ("diffusers", "open_clip", "sentence_transformers", "timm", "transformers")
        ),
    }
    needed = ("prediction/coefficients.json", "reporting/page/page.html", "reporting/page/style.css", "py.typed")
    assert all(f"mergeid/{n}" in names for n in needed)
    assert not [n for n in names if n.endswith((".pyc", ".npz", ".safetensors", ".csv"))]
