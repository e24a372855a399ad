"""sentence-transformers' `SentenceTransformer.merge` (on mergekit) beside mergeid, in one run, on folders with two
dense layers: the largest difference of any tensor, for five methods that draw nothing.

    pip install --no-deps mergekit==0.1.5 immutables; python tests/bench/sentence_transformers_parity.py

writes tables/sentence_transformers_parity.csv. Parameters are given alike to both, whatever their defaults are.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import mergeid

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from test_adapter_sentence_transformers import saved_folder

TABLE = Path(__file__).parent / "tables" / "sentence_transformers_parity.csv"
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "linear": ({"weight": [0.3, 0.7], "normalize": True}, {"weights": [0.3, 0.7]}, False),
    "slerp": ({"t": 0.3}, {"weights": [0.7, 0.3]}, False),
    "task_arithmetic": ({"weight": [0.3, 0.7], "normalize": False}, {"weights": [0.3, 0.7]}, True),
    "ties": (
        {"weight": [0.3, 0.7], "density": 0.5, "normalize": True},
        {"weights": [0.3, 0.7], "density": 0.5},
        True,
    ),
    "model_stock": ({}, {}, True),
}
"""Method -> parameters of theirs, keywords of ours, whether there is a base."""


def states(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.rglob("*.safetensors"):
        found |= {f"{file.parent.relative_to(folder)}/{k}": t for k, t in load_file(file).items()}
    return found


def main() -> None:
    from sentence_transformers import SentenceTransformer

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, a, b = (saved_folder(folder / n, i) for i, n in enumerate(("base", "a", "b")))
        for method, (theirs, ours, based) in METHODS.items():
            told: dict[str, Any] = {"base_model": str(base)} if based else {}
            if method == "slerp":
                told = {"base_model": str(a)}
            parameters = {k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in theirs.items()}
            merged = SentenceTransformer.merge(
                [str(a), str(b)], method=method, parameters=parameters, device="cpu", **told
            )
            merged.save(str(folder / f"st_{method}"), create_model_card=False)
            mergeid.merge(
                a, b, base=base if based else None, method=method, output=folder / method, match="never", **ours
            )
            one, two = states(folder / f"st_{method}"), states(folder / method)
            assert one.keys() == two.keys()
            most = max(float((t.double() - two[k].double()).abs().max()) for k, t in one.items())
            rows.append([method, f"{most:.2g}"])
    with TABLE.open("w", newline="") as file:
        csv.writer(file).writerows([["method", "largest difference"], *rows])


if __name__ == "__main__":
    main()
