"""The coefficients that ship are those that examples/zoo/fit.py makes of the tables that ship."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ZOO = Path(__file__).parents[2] / "examples" / "zoo"


def alike(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(alike(x, y) for x, y in zip(one, two, strict=True))
    if isinstance(one, float) and isinstance(two, (int, float)):
        return one == pytest.approx(two, rel=1e-4, abs=1e-3)
    return bool(one == two)


@pytest.mark.slow
def test_the_shipped_coefficients_are_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ZOO))
    try:
        import fit

        rows = fit.known()
        made = fit.fitted(rows.cases, rows.midpoints).to_json()
    finally:
        for name in ("fit", "rivals", "pairs_table", "measuring", "families", "recipes", "tasks", "training"):
            sys.modules.pop(name, None)
    shipped = json.loads(files("mergeid.prediction").joinpath("coefficients.json").read_text(encoding="utf-8"))
    assert alike(json.loads(json.dumps(made)), shipped)
