"""Constructed (ε, c)-equivalent solutions against what is predicted for them, and neurons that interact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import null_space

from mergeid.errors import MergeidError
from mergeid.evidence.equivalent import Equivalence, Equivalents, measure, study
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.interaction import interactions
from mergeid.evidence.support import InputMoments

EXAMPLES = Path(__file__).parents[2] / "examples"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def layer(case, *, m=8, d=16, k=5, noise=0.0, seed=0):
    """Inputs on a k-dimensional subspace, and a layer on them: (equivalents, inputs, readout)."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((500, k)) @ rng.standard_normal((k, d)))
    x = x + noise * torch.from_numpy(rng.standard_normal((500, d)))
    moments = InputMoments(d)
    moments.add(x)
    support = moments.support(1.0, centred=False).with_k(k)
    fixed, trained = (torch.from_numpy(rng.standard_normal((m, d))) for _ in range(2))
    scaling = rows = None
    if case == "mask":
        scaling = torch.from_numpy((rng.random((m, d)) < 0.6).astype(float))
    elif case == "poor mask":  # fewer free weights than dimensions
        scaling = torch.zeros(m, d, dtype=torch.float64)
        scaling[:, : k - 2] = 1
    elif case == "row space":
        rows = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, 9)))[0])
        trained = trained @ rows @ rows.T
    if scaling is not None:
        trained = scaling * trained
    classes = FunctionClasses(fixed, (support,), scaling, rows)
    return Equivalents(classes, trained), x, torch.from_numpy(rng.standard_normal((m, 3)))


def network(x, readout):
    """Two layers; the next one follows the permutation of the neurons' functions."""

    def outputs(effective, permutation):
        return torch.relu(x @ effective.T) @ readout[torch.from_numpy(permutation)]

    return outputs


@pytest.mark.parametrize("case", ["plain", "mask", "poor mask", "row space"])
def test_kernel_moves_change_nothing_and_add_their_square(case):
    found, x, readout = layer(case)
    outputs = network(x, readout)
    identity = np.arange(8)
    made = found.make(identity, unseen=0.7, change=0.0, generator=generator(0))
    reference = outputs(found._effective(found.trained), identity)
    measured = measure(outputs(made.effective, identity), reference, made.trained, found.trained)
    assert measured.error < 1e-10 and measured.growth == pytest.approx(made.predicted.growth, rel=1e-10)
    least = found.realize(found.coefficients)
    square = least.square().sum() + (0.7 * found.norm) ** 2
    assert measured.growth**2 == pytest.approx(float(square / found.norm**2), rel=1e-9)
    assert torch.equal(found.cost.diagonal().isfinite(), torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(least.square().sum(1), found.cost.diagonal())


@pytest.mark.parametrize("case", ["mask", "row space"])
def test_kernels_are_those_of_scipy(case):
    found, _, _ = layer(case)
    moves = found.kernel(torch.randn(8, 16, dtype=torch.float64, generator=generator(1)))
    u = found.support.U.numpy()
    for i in range(8):
        free = np.diag(found.classes.scaling[i].numpy()) if case == "mask" else np.eye(16)
        basis = null_space(u.T @ free)
        if case == "row space":
            q = found.classes.row_space.numpy()
            basis = q @ null_space(u.T @ q)
        v = moves[i].numpy()
        np.testing.assert_allclose(basis @ (basis.T @ v), v, atol=1e-9)
        assert np.linalg.norm(v) > 0.1


@pytest.mark.parametrize("case", ["plain", "mask", "row space"])
def test_a_realized_permutation_has_the_norm_that_the_costs_predict(case):
    found, x, readout = layer(case)
    outputs = network(x, readout)
    permutation = np.array([1, 0, 3, 4, 2, 5, 6, 7])
    made = found.make(permutation, unseen=0.0, change=0.0, generator=generator(0))
    reference = outputs(found._effective(found.trained), np.arange(8))
    measured = measure(outputs(made.effective, permutation), reference, made.trained, found.trained)
    cost = found.cost.numpy()
    c = np.sqrt(sum(cost[i, permutation[i]] for i in range(8))) / float(found.trained.norm())
    assert measured.error < 1e-9 and measured.growth == pytest.approx(c, rel=1e-9)
    assert found.predicted_growth(permutation) == pytest.approx(c)
    assert measured.holds(1e-6, c * 1.001) and not measured.holds(1e-6, c * 0.999)
    # nothing with less norm does it: any other solution differs by a kernel move
    for seed in range(5):
        other = found.make(permutation, unseen=0.1, change=0.0, generator=generator(seed))
        assert other.trained.norm() > made.trained.norm()


def test_swaps_out_of_reach_are_not_made():
    found, _, _ = layer("poor mask")
    swap = np.array([1, 0, *range(2, 8)])
    assert found.predicted_growth(swap) == np.inf
    assert found.make(swap, unseen=0.1, change=0.0, generator=generator(0)) is None


@pytest.mark.parametrize("case", ["plain", "mask", "poor mask"])
def test_changes_have_the_predicted_size(case):
    found, x, _ = layer(case)
    made = found.make(np.arange(8), unseen=0.5, change=0.01, generator=generator(3))
    before, after = x @ found._effective(found.trained).T, x @ made.effective.T
    error = float((after - before).norm() / before.norm())
    assert error == pytest.approx(0.01, rel=1e-8) and made.predicted.error == pytest.approx(0.01, rel=1e-8)
    assert float(made.trained.norm()) / found.norm == pytest.approx(made.predicted.growth, rel=1e-9)


def test_a_thousand_solutions_of_one_asymmetric_layer():
    """Measured through the next layer: norms as predicted, output errors of the size asked for."""
    found, x, readout = layer("mask", m=12)
    outputs = network(x, readout)
    count = moved = 0
    errors = []
    for made, measured in study(found, outputs, 1000, epsilon=0.02, generator=generator(0)):
        count += 1
        moved += bool((made.permutation != np.arange(12)).any())
        assert measured.growth == pytest.approx(made.predicted.growth, rel=1e-8)
        rows = torch.arange(12)
        least = float(found.cost[rows, torch.from_numpy(made.permutation)].sum())
        change = made.predicted.error
        assert float(made.trained.square().sum()) >= least * (1 - 4 * change) - 1e-9
        errors.append(measured.error / max(change, 1e-12))
        assert measured.holds(0.1, made.predicted.growth * 1.0001)
    assert count == 1000 and 600 <= moved <= 667
    assert 0.5 < np.median(errors) < 2


def test_inputs_off_the_support_show_in_the_error():
    found, x, readout = layer("plain", noise=0.05)
    outputs = network(x, readout)
    reference = outputs(found._effective(found.trained), np.arange(8))
    made = found.make(np.arange(8), unseen=0.5, change=0.0, generator=generator(0))
    measured = measure(outputs(made.effective, np.arange(8)), reference, made.trained, found.trained)
    assert 1e-3 < measured.error < 0.2
    # and are predicted, for the pre-activations, from the second moments
    before, after = x @ found._effective(found.trained).T, x @ made.effective.T
    assert float((after - before).norm() / before.norm()) == pytest.approx(made.predicted.error, rel=1e-8)


def test_definition_and_errors():
    ones = torch.ones(4, 2)
    found = measure(1.1 * ones, ones, 3 * ones, ones)
    assert found.error == pytest.approx(0.1) and found.growth == pytest.approx(3)
    assert found.holds(0.11, 3.01) and not found.holds(0.09, 3.01) and not found.holds(0.11, 2.9)
    assert Equivalence(0.1, 2.0).holds(0.1, 2.0)
    with pytest.raises(MergeidError, match="of one shape"):
        measure(ones, ones[:2], ones, ones)
    with pytest.raises(MergeidError, match="must not be 0"):
        measure(ones, 0 * ones, ones, ones)
    both, _, _ = layer("plain")
    classes = FunctionClasses(both.classes.fixed, both.classes.supports * 2)
    with pytest.raises(MergeidError, match="one group"):
        Equivalents(classes, both.trained)
    one = torch.eye(16, 1, dtype=torch.float64)
    with pytest.raises(MergeidError, match="right fixed part"):
        Equivalents(FunctionClasses(both.classes.fixed, both.classes.supports, row_space=one), both.trained)


def test_interactions_are_the_kernel_of_the_readout():
    rng = np.random.default_rng(0)
    readout = rng.standard_normal((4, 7))
    readout[:, 5] = -2 * readout[:, 1]
    readout[:, 6] = 0
    found = interactions(torch.from_numpy(readout))
    kernel = null_space(readout)
    assert found.rank == 4 and found.hidden == kernel.shape[1] == 3
    np.testing.assert_allclose(found.freedom.numpy(), (kernel**2).sum(1), atol=1e-10)
    assert found.together == [(1, 5, -1)] and found.freedom[6] == pytest.approx(1)
    full = interactions(torch.from_numpy(rng.standard_normal((9, 4))))
    assert full.hidden == 0 and full.freedom.abs().max() < 1e-12 and full.together == []
    nothing = interactions(torch.zeros(3, 2))
    assert nothing.rank == 0 and nothing.together == [] and (nothing.freedom == 1).all()


def test_neurons_that_are_identifiable_one_by_one_and_interact(capsys):
    """The counter-example of examples/interacting_neurons.py, and its numbers by hand."""
    path = EXAMPLES / "interacting_neurons.py"
    spec = importlib.util.spec_from_file_location("interacting_neurons", path)
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    found = example.report()
    # all inputs span the plane, so T = 2⟨w_1 − w_2, f_1 − f_2⟩ with f_1 − f_2 = (1.5, 0)
    assert [m.value for m in found.margins] == pytest.approx([6.0, 3.0])
    assert [m.value for m in found.relu_margins] == pytest.approx([6.0, 3.0])
    assert all(m.identifiable for m in (*found.margins, *found.relu_margins))
    assert all(s.by_norm > 0 for s in found.stabilities)
    # and yet both are equivalent at the same norm, without a permutation between them
    assert found.equivalence.error < 1e-12 and found.equivalence.growth == pytest.approx(1)
    assert found.correlations.max() < 0.9
    assert found.interactions.together == [(0, 1, -1)]
    assert found.interactions.freedom.tolist() == pytest.approx([0.5, 0.5])
    # relu(z + y/2) − relu((y − z)/2) = 1.5 z
    assert found.average[0] == pytest.approx(0.5) and found.average[1] > 0.9
    example.main()
    assert "they interact" in capsys.readouterr().out
