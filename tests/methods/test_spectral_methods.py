"""Methods that merge task vectors as matrices, and EMR, against the papers' formulas written out in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergeid.errors import MergeidError
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings

Array = np.ndarray
SEEDS = range(4)
SHAPES = [(7, 5), (4, 9), (6, 6)]


def draw(seed: int, *shape: int, count: int) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for _ in range(count)]


def merge(name: str, tensors: Sequence[Array], base: Array, **told: Any) -> Array:
    given = [torch.from_numpy(t) for t in tensors]
    weights = told.pop("weights", [1 / len(tensors)] * len(tensors))
    return get_method(name)(given, weights, base=torch.from_numpy(base), **told).numpy()


def whitened(x: Array) -> Array:
    """(x xᵀ)^{-1/2} x, by eigenvalues: the paper's other way to write the nearest orthonormal matrix."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values, vectors = np.linalg.eigh(gram)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return x @ root if x.shape[0] >= x.shape[1] else root @ x


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tsv(seed: int, shape: tuple[int, int]) -> None:
    base, *tensors = draw(seed, *shape, count=3)
    lefts, rights, strengths = [], [], []
    for x in tensors:
        u, s, v = np.linalg.svd(x - base, full_matrices=False)
        kept = min(shape) // 2
        lefts.append(u[:, :kept])
        rights.append(v[:kept])
        strengths.append(s[:kept])
    expected = whitened(np.hstack(lefts)) @ np.diag(np.concatenate(strengths)) @ whitened(np.vstack(rights))
    np.testing.assert_allclose(merge("tsv", tensors, base, scale=0.7), base + 0.7 * expected, atol=1e-9)


def test_tsv_of_tasks_that_do_not_meet_is_their_sum() -> None:
    base = np.zeros((8, 8))
    one, two = np.zeros((2, 8, 8))
    one[:4, :4], two[4:, 4:] = draw(1, 4, 4, count=2)
    np.testing.assert_allclose(merge("tsv", [one, two], base), one + two, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c(seed: int, shape: tuple[int, int]) -> None:
    base, *tensors = draw(seed, *shape, count=4)
    total = sum(x - base for x in tensors)
    found = (merge("iso_c", tensors, base, scale=0.5) - base) / 0.5
    values = np.linalg.svd(total, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), values.mean(), rtol=1e-9)
    np.testing.assert_allclose(found, values.mean() * whitened(total), atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(9, 8), (8, 12)])
@pytest.mark.parametrize("fraction", [0.5, 0.8, 1.0])
def test_iso_cts(seed: int, shape: tuple[int, int], fraction: float) -> None:
    base, *tensors = draw(seed, *shape, count=4)
    deltas = [x - base for x in tensors]
    u, s, v = np.linalg.svd(sum(deltas), full_matrices=False)
    each = round((8 - int(8 * fraction)) / 3)
    common = 8 - 3 * each
    lefts, rights, strengths = [u[:, :common]], [v[:common]], [s[:common]]
    for delta in deltas:
        p, t, q = np.linalg.svd(delta - u[:, :common] @ u[:, :common].T @ delta, full_matrices=False)
        lefts.append(p[:, :each])
        rights.append(q[:each])
        strengths.append(t[:each])
    directions = whitened(np.hstack(lefts)) @ whitened(np.vstack(rights))
    expected = base + np.concatenate(strengths).mean() * directions
    np.testing.assert_allclose(merge("iso_cts", tensors, base, common_fraction=fraction), expected, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(3, 9), (7, 4)])
def test_wudi_is_where_gradient_descent_from_the_sum_ends(seed: int, shape: tuple[int, int]) -> None:
    base, *tensors = draw(seed, *shape, count=3)
    deltas = [torch.from_numpy(x - base) for x in tensors]
    task = sum(deltas).clone().requires_grad_()  # type: ignore[union-attr]
    optimizer = torch.optim.LBFGS([task], lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = sum(((task - d) @ d.T).square().sum() / d.square().sum() for d in deltas)
        total.backward()
        return total

    optimizer.step(loss)
    np.testing.assert_allclose(merge("wudi", tensors, base), base + task.detach().numpy(), atol=1e-5)


def test_wudi_of_equal_tasks_is_that_task() -> None:
    base, x = draw(3, 5, 6, count=2)
    np.testing.assert_allclose(merge("wudi", [x, x, base], base), x, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", [0, 1, 3])
def test_emr(seed: int, task: int) -> None:
    base, *tensors = draw(seed, 4, 6, count=4)
    deltas = [x - base for x in tensors]
    chosen = np.zeros((4, 6))
    for i in np.ndindex(4, 6):
        sign = np.sign(sum(d[i] for d in deltas))
        chosen[i] = sign * max(abs(d[i]) for d in deltas if np.sign(d[i]) == sign)
    if task:
        own = deltas[task - 1]
        masked = np.where(own * chosen > 0, chosen, 0.0)
        chosen = masked * np.abs(own).sum() / np.abs(masked).sum()
    np.testing.assert_allclose(merge("emr", tensors, base, task=task, scale=0.9), base + 0.9 * chosen, rtol=1e-9)
    with pytest.raises(MergeidError, match="'task' is 4; expected 1 to 3 for one of the models, or 0 for none"):
        merge("emr", tensors, base, task=4)


def low_rank(seed: int, count: int) -> list[Array]:
    """Updates [6, 8] of rank 2, as adapters make them."""
    return [b @ a for b, a in zip(draw(seed, 6, 2, count=count), draw(seed + 9, 2, 8, count=count), strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_knots_ties(seed: int) -> None:
    (base,) = draw(seed + 30, 6, 8, count=1)
    deltas, weights, density = low_rank(seed, 2), [0.8, 0.5], [0.4, 0.7]
    found = merge("knots_ties", [base + d for d in deltas], base, weights=weights, density=density, scale=0.9)
    u, s, v = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    parts = [v[:4, :8], v[:4, 8:]]
    trimmed = []
    for part, share in zip(parts, density, strict=True):
        cut = np.sort(np.abs(part).reshape(-1))[-int(share * part.size)]
        trimmed.append(np.where(np.abs(part) >= cut, part, 0))
    merged = np.zeros((4, 8))
    for i in np.ndindex(4, 8):
        values = [w * t[i] for w, t in zip(weights, trimmed, strict=True)]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [(w, x) for w, x in zip(weights, values, strict=True) if x * sign > 0]
        if agreeing:
            merged[i] = sum(x for _, x in agreeing) / sum(w for w, _ in agreeing)
    np.testing.assert_allclose(found, base + 0.9 * u[:, :4] * s[:4] @ merged, atol=1e-8)


def test_knots_without_trimming_of_adapters_that_agree_is_the_adapter() -> None:
    (base,) = draw(5, 6, 8, count=1)
    (delta,) = low_rank(5, 1)
    told = {"weights": [0.5, 0.5], "density": [1.0, 1.0]}
    np.testing.assert_allclose(merge("knots_ties", [base + delta] * 2, base, **told), base + delta, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "wudi", "knots_ties"])
def test_vectors_are_averaged_and_filters_unfolded(name: str) -> None:
    told = {"density": [1.0] * 3, "weights": [1.0] * 3} if name == "knots_ties" else {}
    base, *tensors = draw(2, 12, count=4)
    np.testing.assert_allclose(merge(name, tensors, base, **dict(told)), sum(tensors) / 3, rtol=1e-9)
    base, *tensors = draw(2, 6, 3, 2, 2, count=4)
    flat = merge(name, [t.reshape(6, 12) for t in tensors], base.reshape(6, 12), **dict(told))
    np.testing.assert_allclose(merge(name, tensors, base, **dict(told)), flat.reshape(6, 3, 2, 2), rtol=1e-9)


def test_lines_is_a_gradient_of_lambda() -> None:
    """LiNeS (Wang et al. 2024, arXiv:2410.17146) scales the task vector by α + β (l − 1) / (L − 1) in layer l."""
    names = [f"h.{i}.w" for i in range(5)]
    told = MergeSettings.of(get_method("task_arithmetic"), 2, names, parameters={"lambda": (0.2, 1.0)})
    for i, name in enumerate(names):
        assert told.keywords(name)["scale"] == pytest.approx(0.2 + 0.8 * i / 4)
