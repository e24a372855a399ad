"""The examples of the engine run, and find what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield
    for name in {"digits", "shifted_inputs", "equivalent_solutions"} & (set(sys.modules) - before):
        del sys.modules[name]


def test_no_certified_decision_flips_when_inputs_shift(examples, capsys):
    import shifted_inputs

    certified = 0
    for kind in ("noise", "scaled", "base"):
        counts, certificates = shifted_inputs.run(kind, seed=3, epochs=4)
        assert len(certificates) == 2
        assert set(counts) >= {"swaps", "permutations"} and (len(counts) == 2) == (kind == "scaled")
        for count in counts.values():
            assert count.certified + count.others == 2 * len(shifted_inputs.STRENGTHS) * 13
            assert count.certified_flips == 0
            certified += count.certified
    assert certified > 100
    assert shifted_inputs.main(["--seeds", "1", "--epochs", "1", "--kinds", "mask"]) == 0
    assert "certified decisions that flipped: 0" in capsys.readouterr().out


def test_equivalent_solutions_have_the_predicted_norm(examples, capsys):
    import equivalent_solutions

    table, _ = equivalent_solutions.construct(60, epsilon=0.02, tau=0.95, epochs=4, seed=1)
    assert len(table.rows) == 60 and table.moved.sum() == 40
    np.testing.assert_allclose(table.rows[:, 2], table.rows[:, 1], rtol=1e-8)
    # to take over another's function takes more norm than to keep one's own
    assert np.median(table.rows[table.moved, 2]) > np.median(table.rows[~table.moved, 2])
    equivalent_solutions.main(["--count", "12", "--epochs", "1"])
    assert "12 solutions, 8 of them permuted" in capsys.readouterr().out
