"""How far the merge methods are from the naive implementations that their tests write out in NumPy or plain loops, in
float64: the largest difference of any number, relative to the largest one of the result.

    python tests/bench/naive_parity.py

runs the tests of `tests/methods` that have such an oracle and writes tables/naive_parity.csv.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ORACLES = {
    "test_task_arithmetic": "task_arithmetic: weights, lambda, normalize",
    "test_ties": "ties: density, weights, lambda, mean or sum",
    "test_ties_rescaled": "ties: rescale",
    "test_dare_and_della_with_the_masks_given": "dare_linear, dare_ties, della, della_linear: masks injected",
    "test_breadcrumbs": "breadcrumbs, breadcrumbs_ties",
    "test_nuslerp": "nuslerp: flat, rows, columns; with and without a base",
    "test_multislerp": "multislerp: with and without a base, normalize",
    "test_sce": "sce: select_topk",
    "test_ram": "ram, ramplus_tl",
    "test_arcee_fusion": "arcee_fusion",
    "test_model_stock": "model_stock",
    "test_fisher": "fisher",
    "test_regmean_is_the_least_squares_solution": "regmean",
    "test_tsv": "tsv",
    "test_iso_c": "iso_c",
    "test_iso_cts": "iso_cts: common_fraction",
    "test_wudi_is_where_gradient_descent_from_the_sum_ends": "wudi: against L-BFGS on its loss",
    "test_emr": "emr: unified and per task",
    "test_knots_ties": "knots_ties: density, weights",
}
"""Test -> method and options."""
METHODS = Path(__file__).parents[1] / "methods"
TABLE = Path(__file__).parent / "tables" / "naive_parity.csv"


class Watch:
    """A plugin of pytest that remembers the largest difference of every test."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = defaultdict(float)
        self._test = ""

    def pytest_runtest_call(self, item: Any) -> None:
        self._test = item.originalname

    def compared(self, found: Any, expected: Any, *args: Any, **told: Any) -> None:
        one, two = (np.asarray(v, dtype=np.float64) for v in (found, expected))
        size = float(np.abs(two).max(initial=0)) or 1.0
        self.largest[self._test] = max(self.largest[self._test], float(np.abs(one - two).max(initial=0)) / size)
        PLAIN(found, expected, *args, **told)


PLAIN = np.testing.assert_allclose


def main() -> None:
    watch = Watch()
    np.testing.assert_allclose = watch.compared  # type: ignore[assignment]
    chosen = " or ".join(ORACLES)
    assert pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, str(METHODS)], plugins=[watch]) == 0
    missing = ORACLES.keys() - watch.largest.keys()
    assert not missing, missing
    with TABLE.open("w", newline="") as file:
        rows = [[what, f"{watch.largest[test]:.1e}"] for test, what in ORACLES.items()]
        csv.writer(file).writerows([["method and options", "largest difference"], *rows])


if __name__ == "__main__":
    main()
