"""Every merge method against naive loops and its published formula in NumPy float64, and the properties of all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeid.errors import MergeidError
from mergeid.methods import pieces
from mergeid.methods.fisher import fisher
from mergeid.methods.registry import MergeMethod, get_method, method_names
from mergeid.methods.regmean import regmean, solve
from mergeid.methods.settings import MergeSettings
from mergeid.methods.spherical import angle, karcher, slerp
from mergeid.methods.statistics import Gram
from mergeid.methods.stock import model_stock
from mergeid.methods.task_arithmetic import task_arithmetic
from mergeid.methods.ties import threshold, ties

dare_linear, dare_ties = get_method("dare_linear"), get_method("dare_ties")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, count: int = 1, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def numpy(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    return [t.double().numpy() for t in tensors]


def needs(method: MergeMethod, tensors: list[torch.Tensor], seed: int = 0, **chosen: Any) -> dict[str, Any]:
    """All keywords that a method takes, with its defaults, a base and statistics from the seed."""
    found: dict[str, Any] = {}
    for p in method.parameters:
        value = chosen.get(p.name, p.default)
        found[p.keyword or p.name] = [value] * len(tensors) if p.per_model else value
    if method.base:
        found["base"] = chosen.get("base", draw(seed + 1, *tensors[0].shape, dtype=tensors[0].dtype)[0])
    if method.seeded:
        found["generator"] = torch.Generator().manual_seed(seed)
    if method.statistics == "fisher":
        found["statistics"] = [x.square() for x in draw(seed + 2, *tensors[0].shape, count=len(tensors))]
    if method.statistics == "gram":
        inputs = draw(seed + 2, 50, tensors[0].shape[1], count=len(tensors))
        found["statistics"] = [Gram(x.T @ x / len(x), 1) for x in inputs]
    return found


SPECTRAL = ("tsv", "iso_c", "iso_cts", "wudi", "knots_ties")
"""Change the spectrum of what all agree on too, or give it back to rounding only."""


def equal_shares(count: int) -> list[float]:
    return [1 / count] * count


@pytest.fixture(params=method_names())
def method(request: pytest.FixtureRequest) -> MergeMethod:
    return get_method(request.param)


def models_of(method: MergeMethod, most: int = 3) -> int:
    return min(method.most or most, most)


def test_the_field_is_covered() -> None:
    assert set(method_names()) >= {
        "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock", "fisher", "regmean",
        "karcher", "nuslerp", "multislerp", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram",
        "ramplus_tl", "nearswap", "arcee_fusion", "passthrough", "tsv", "iso_c", "iso_cts", "wudi", "emr", "knots_ties",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3])
def test_a_model_merged_with_itself_is_itself(method: MergeMethod, dtype: torch.dtype, count: int) -> None:
    if method.name in SPECTRAL:
        return
    x = draw(1, 6, 5, dtype=dtype)[0]
    tensors = [x] * min(count, method.most or count)
    found = method(tensors, equal_shares(len(tensors)), **needs(method, tensors))
    assert found.dtype == dtype and found.shape == x.shape
    # b + (x - b) is rounded twice in the accumulator, at most one unit in the last place of x afterwards
    unit = torch.finfo(dtype).eps * x.abs().double().clamp(min=1)
    assert ((found.double() - x.double()).abs() <= unit * (4 if dtype == torch.float64 else 1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_equal_the_base_leave_the_base(method: MergeMethod, dtype: torch.dtype) -> None:
    if not method.base:
        return
    base = draw(3, 4, 7, dtype=dtype)[0]
    tensors = [base.clone() for _ in range(models_of(method))]
    chosen = {"density": 0.4} if any(p.name == "density" for p in method.parameters) else {}
    assert torch.equal(
        method(tensors, [0.2, 0.9, -0.4][: len(tensors)], **needs(method, tensors, base=base, **chosen)), base
    )


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(sorted(method_names())))
def test_neurons_in_another_order_give_the_merge_in_that_order(seed: int, name: str) -> None:
    """Permutation equivariance, of rows and of columns (random masks aside, which belong to positions)."""
    method = get_method(name)
    tensors = draw(seed, 6, 5, count=models_of(method))
    chosen = {"density": 1.0 if method.seeded else 0.4}
    told = needs(method, tensors, seed, **chosen)
    rows = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(5, generator=torch.Generator().manual_seed(seed + 1))

    def move(x: torch.Tensor) -> torch.Tensor:
        return x[rows][:, columns]

    moved = dict(told)
    if method.base:
        moved["base"] = move(told["base"])
    if method.statistics == "fisher":
        moved["statistics"] = [move(f) for f in told["statistics"]]
    if method.statistics == "gram":
        moved["statistics"] = [Gram(g.matrix[columns][:, columns], 1) for g in told["statistics"]]
    if method.seeded:
        told["generator"], moved["generator"] = (torch.Generator().manual_seed(1) for _ in range(2))
    shares = equal_shares(len(tensors))
    torch.testing.assert_close(
        method([move(t) for t in tensors], shares, **moved), move(method(tensors, shares, **told))
    )


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(sorted(method_names())), st.permutations([0, 1, 2]))
def test_the_order_of_the_models_does_not_matter(seed: int, name: str, order: list[int]) -> None:
    method = get_method(name)
    if method.ordered:
        return
    count = models_of(method)
    order = [i for i in order if i < count]
    tensors = draw(seed, 6, 5, count=count)
    weights = [0.2, 0.5, 0.3][:count] if count == 3 else [0.3, 0.7]
    told = needs(method, tensors, seed, density=1.0 if method.seeded else 0.4)
    other = dict(told)
    if method.statistics:
        other["statistics"] = [told["statistics"][i] for i in order]
    first = method(tensors, weights, **told)
    torch.testing.assert_close(method([tensors[i] for i in order], [weights[i] for i in order], **other), first)


@pytest.mark.parametrize("chosen", [0, 1])
def test_weight_one_on_one_model_gives_that_model(method: MergeMethod, chosen: int) -> None:
    if method.weights == "ignored":
        return
    tensors = draw(4, 6, 5, count=2)
    weights = [float(i == chosen) for i in range(2)]
    torch.testing.assert_close(method(tensors, weights, **needs(method, tensors)), tensors[chosen])


# --- formulas ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.floats(-2, 2), min_size=2, max_size=4), st.floats(-1, 2))
def test_task_arithmetic(seed: int, weights: list[float], scale: float) -> None:
    base, *tensors = draw(seed, 3, 4, count=len(weights) + 1)
    b, *x = numpy([base, *tensors])
    expected = b + scale * sum(w * (t - b) for w, t in zip(weights, x, strict=True))
    found = task_arithmetic(tensors, weights, base=base, scale=scale)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    total = math.fsum(weights)
    if abs(total) > 1e-3:
        found = task_arithmetic(tensors, weights, base=base, scale=scale, normalize=True)
        np.testing.assert_allclose(found.numpy(), b + (expected - b) / total, rtol=1e-9, atol=1e-9)


def naive_ties(
    base: np.ndarray, tensors: list[np.ndarray], weights: list[float], density: list[float], scale: float, mean: bool
) -> np.ndarray:
    """The paper's three steps, element by element."""
    trimmed = []
    for tensor, share in zip(tensors, density, strict=True):
        delta = tensor - base
        order = sorted(np.ndindex(*delta.shape), key=lambda i, delta=delta: -abs(delta[i]))
        keep = set(order[: max(1, int(share * delta.size))]) if share > 0 else set()
        trimmed.append({i: (delta[i] if i in keep else 0.0) for i in order})
    out = base.copy()
    for i in np.ndindex(*base.shape):
        values = [w * t[i] for w, t in zip(weights, trimmed, strict=True)]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        if agreeing:
            divisor = sum(w for w, _ in agreeing) if mean else 1.0
            out[i] += scale * sum(v for _, v in agreeing) / (divisor or 1.0)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.lists(st.tuples(st.floats(0.1, 2), st.floats(0, 1)), min_size=2, max_size=4),
    st.floats(0.1, 2),
    st.booleans(),
)
def test_ties(seed: int, models: list[tuple[float, float]], scale: float, mean: bool) -> None:
    weights, density = ([m[k] for m in models] for k in range(2))
    base, *tensors = draw(seed, 4, 5, count=len(models) + 1)
    found = ties(tensors, weights, base=base, density=density, scale=scale, normalize=mean)
    b, *x = numpy([base, *tensors])
    np.testing.assert_allclose(found.numpy(), naive_ties(b, x, weights, density, scale, mean), rtol=1e-10, atol=1e-10)


def test_ties_of_the_papers_figure() -> None:
    """Values of opposite sign do not cancel: the larger mass wins, and the mean is over those that agree."""
    base = torch.zeros(3)
    tensors = [torch.tensor([4.0, 1.0, 0.1]), torch.tensor([2.0, -3.0, 0.1]), torch.tensor([-1.0, -1.0, 5.0])]
    found = ties(tensors, [1.0] * 3, base=base, density=[0.67] * 3)
    assert torch.equal(found, torch.tensor([3.0, -2.0, 5.0]))


def test_trimming_keeps_what_ties_with_the_smallest() -> None:
    base, x = torch.zeros(4), torch.tensor([1.0, -1.0, 2.0, 0.5])
    for density, kept in (
        (0.5, [1.0, -1.0, 2.0, 0.0]),
        (0.01, [0.0, 0.0, 2.0, 0.0]),
        (0.0, [0.0] * 4),
        (1.0, x.tolist()),
    ):
        assert ties([x, x], [0.5, 0.5], base=base, density=[density] * 2).tolist() == kept
    assert threshold(torch.zeros(0), torch.zeros(0), 0.5, torch.float32) == 0


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tensors are merged in pieces; their size is no part of the result."""
    base, *tensors = draw(20, 30, 40, count=4)
    found = []
    for size in (1 << 18, 7, 100):
        monkeypatch.setattr(pieces, "CHUNK", size)
        told = {"base": base, "density": [0.5, 0.3, 1.0]}
        merges = [
            ties(tensors, [0.2, 0.3, 0.5], **told),
            slerp(tensors[:2], [0.3, 0.7]),
            karcher(tensors, [0.2, 0.3, 0.5]),
        ]
        merges += [model_stock(tensors, [1.0] * 3, base=base, filter_wise=f) for f in (False, True)]
        found.append(merges)
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", [dare_linear, dare_ties])
def test_dare_drops_a_share_and_keeps_the_expectation(merge: Callable[..., torch.Tensor]) -> None:
    base = torch.zeros(200, 300, dtype=torch.float64)
    tensors = [torch.full_like(base, 2.0), torch.full_like(base, 1.0)]
    generator = torch.Generator().manual_seed(3)
    found = merge(tensors, [0.5, 0.5], base=base, density=[0.3, 1.0], generator=generator)
    if merge is dare_linear:  # 0.5 · 2 / 0.3 where kept, and always 0.5 · 1
        assert sorted(set(found.reshape(-1).tolist())) == pytest.approx([0.5, 0.5 + 1 / 0.3])
        kept = (found > 1).double().mean().item()
        assert kept == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / found.numel()))
        assert found.mean().item() == pytest.approx(1.5, abs=0.05)
    else:  # all signs agree: the mean over those that are kept
        assert sorted(set(found.reshape(-1).tolist())) == pytest.approx([1.0, 0.5 / 1.0 + 1 / 0.3])


def test_dare_without_dropping_is_task_arithmetic_and_ties() -> None:
    base, *tensors = draw(5, 6, 7, count=4)
    weights = [0.3, 0.5, -0.2]
    full = {"base": base, "density": [1.0] * 3, "scale": 0.7, "generator": torch.Generator().manual_seed(0)}
    torch.testing.assert_close(
        dare_linear(tensors, weights, **full), task_arithmetic(tensors, weights, base=base, scale=0.7)
    )
    weights = [0.3, 0.5, 0.2]
    expected = ties(tensors, weights, base=base, density=[1.0] * 3, scale=0.7)
    torch.testing.assert_close(dare_ties(tensors, weights, **full), expected)


def test_dare_depends_on_the_name_and_the_seed_alone() -> None:
    told = MergeSettings.of(get_method("dare_linear"), 2, ["x", "y"], seed=5)
    first, again, other = (torch.rand(4, generator=told.generator(n)) for n in ("x", "x", "y"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seed = MergeSettings.of(get_method("dare_linear"), 2, ["x", "y"], seed=6)
    assert not torch.equal(first, torch.rand(4, generator=seed.generator("x")))


def test_model_stock() -> None:
    base, *tensors = draw(6, 5, 8, count=4)
    tensors = [base + 0.1 * t + 0.2 for t in tensors]
    b, *x = numpy([base, *tensors])

    def ratio(deltas: list[np.ndarray]) -> float:
        pairs = itertools.combinations(deltas, 2)
        cosine = np.mean([np.sum(p * q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in pairs])
        return 3 * cosine / (1 + 2 * cosine)

    t = ratio([v - b for v in x])
    expected = t * sum(x) / 3 + (1 - t) * b
    np.testing.assert_allclose(model_stock(tensors, [1 / 3] * 3, base=base).numpy(), expected, rtol=1e-12)
    rows = [ratio([v[i] - b[i] for v in x]) for i in range(5)]
    expected = np.stack([t * sum(v[i] for v in x) / 3 + (1 - t) * b[i] for i, t in enumerate(rows)])
    found = model_stock(tensors, [1 / 3] * 3, base=base, filter_wise=True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_model_stock_of_opposite_updates_is_the_base() -> None:
    base = torch.ones(4)
    assert torch.equal(model_stock([base + 1, base - 1], [0.5, 0.5], base=base), base)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 1))
def test_slerp_keeps_length_and_speed(seed: int, t: float) -> None:
    a, b = draw(seed, 3, 7, count=2)
    a, b = a / a.norm(), b / b.norm()
    found = slerp([a, b], [1 - t, t])
    theta = math.acos(float((a * b).sum()))
    assert found.norm().item() == pytest.approx(1, abs=1e-12)
    assert angle(a, found) == pytest.approx(t * theta, abs=1e-7)
    expected = (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)
    torch.testing.assert_close(found, expected)


def test_slerp_where_there_is_no_circle() -> None:
    a = torch.tensor([1.0, 2.0, -1.0])
    assert torch.equal(slerp([a, 3 * a], [0.5, 0.5]), 2 * a)
    assert torch.equal(slerp([a, -a], [0.75, 0.25]), a / 2)
    assert torch.equal(slerp([a, torch.zeros(3)], [0.5, 0.5]), a / 2)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.05, 0.95))
def test_karcher_of_two_equally_long_models_is_slerp(seed: int, t: float) -> None:
    a, b = draw(seed, 4, 5, count=2)
    b = b * (a.norm() / b.norm())
    torch.testing.assert_close(karcher([a, b], [1 - t, t]), slerp([a, b], [1 - t, t]), rtol=1e-6, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(seeds, st.lists(st.floats(0.1, 1), min_size=2, max_size=5))
def test_karcher_is_a_stationary_point(seed: int, weights: list[float]) -> None:
    """Σ w_i log_u(x_i) = 0, the condition of the mean, with logarithms written out in NumPy."""
    shares = [w / math.fsum(weights) for w in weights]
    centre, *noise = draw(seed, 12, count=len(weights) + 1)
    tensors = [centre + 0.5 * n for n in noise]
    found = karcher(tensors, shares).numpy()
    u = found / np.linalg.norm(found)
    lengths = [np.linalg.norm(x) for x in numpy(tensors)]
    assert np.linalg.norm(found) == pytest.approx(sum(w * n for w, n in zip(shares, lengths, strict=True)))
    total = np.zeros(12)
    for w, x, n in zip(shares, numpy(tensors), lengths, strict=True):
        v = x / n
        across = v - (u @ v) * u
        total += w * math.atan2(np.linalg.norm(across), u @ v) * across / np.linalg.norm(across)
    assert np.abs(total).max() < 1e-7


def test_karcher_of_opposite_and_of_zero_models() -> None:
    a = torch.tensor([1.0, 2.0])
    assert torch.equal(karcher([a, -a], [0.5, 0.5]), torch.zeros(2))
    assert torch.equal(karcher([torch.zeros(2)] * 2, [0.5, 0.5]), torch.zeros(2))
    torch.testing.assert_close(karcher([a, torch.zeros(2)], [0.5, 0.5]), a / 2)


def test_fisher() -> None:
    tensors = draw(7, 4, 5, count=3)
    information = [f.square() for f in draw(8, 4, 5, count=3)]
    weights = [0.2, 0.5, 0.3]
    x, f = numpy(tensors), numpy(information)
    expected = sum(w * i * v for w, i, v in zip(weights, f, x, strict=True)) / sum(
        w * i for w, i in zip(weights, f, strict=True)
    )
    np.testing.assert_allclose(fisher(tensors, weights, statistics=information).numpy(), expected, rtol=1e-12)
    # scaled far below the smallest normal number of float32, it is the same
    tiny = [1e-60 * i for i in information]
    np.testing.assert_allclose(fisher(tensors, weights, statistics=tiny).numpy(), expected, rtol=1e-12)
    nothing = [torch.zeros(4, 5, dtype=torch.float64)] * 3
    average = sum(w * v for w, v in zip(weights, x, strict=True))
    np.testing.assert_allclose(fisher(tensors, weights, statistics=nothing).numpy(), average, rtol=1e-12)


def test_regmean_is_the_least_squares_solution() -> None:
    """With all of the off-diagonal entries it minimises Σ_i w_i ‖W X_i − W_i X_i‖², solved here by NumPy's lstsq."""
    tensors = draw(9, 3, 6, count=3)
    inputs = draw(10, 40, 6, count=3)
    weights = [0.2, 0.5, 0.3]
    grams = [Gram(x.T @ x, 1) for x in inputs]
    stacked = np.concatenate([math.sqrt(w) * x for w, x in zip(weights, numpy(inputs), strict=True)])
    wanted = np.concatenate(
        [math.sqrt(w) * x @ t.T for w, x, t in zip(weights, numpy(inputs), numpy(tensors), strict=True)]
    )
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    found = regmean(tensors, weights, statistics=grams, alpha=1.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    transposed = regmean([t.T for t in tensors], weights, statistics=[Gram(g.matrix, 0) for g in grams], alpha=1.0)
    torch.testing.assert_close(transposed, found.T)
    # alpha = 0: every column is the average weighted by its own energy
    energy = [w * np.diag(g.matrix.numpy()) for w, g in zip(weights, grams, strict=True)]
    expected = sum(t * e for t, e in zip(numpy(tensors), energy, strict=True)) / sum(energy)
    np.testing.assert_allclose(regmean(tensors, weights, statistics=grams, alpha=0.0).numpy(), expected, rtol=1e-9)


def test_regmean_averages_what_no_input_shows() -> None:
    tensors = draw(11, 3, 6, count=2)
    inputs = draw(12, 40, 6, count=2)
    for x in inputs:
        x[:, 4:] = 0
    found = regmean(tensors, [0.5, 0.5], statistics=[Gram(x.T @ x, 1) for x in inputs], alpha=1.0)
    torch.testing.assert_close(found[:, 4:], (tensors[0] + tensors[1])[:, 4:] / 2)
    seen = [x[:, :4] for x in inputs]
    alone = regmean([t[:, :4] for t in tensors], [0.5, 0.5], statistics=[Gram(x.T @ x, 1) for x in seen], alpha=1.0)
    torch.testing.assert_close(found[:, :4], alone)


def test_solving_singular_systems_is_the_pseudo_inverse() -> None:
    x = draw(13, 3, 6)[0]
    matrix, right = x.T @ x, draw(14, 6, 2)[0]
    np.testing.assert_allclose(
        solve(matrix, right), np.linalg.pinv(matrix.numpy(), rcond=1e-9) @ right.numpy(), atol=1e-9
    )


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "models", "told", "match"),
    [
        ("ties", 2, {"parameters": {"densty": 0.5}}, r"'ties' has no parameter 'densty' \(did you mean 'density'\?\)"),
        ("ties", 2, {"parameters": {"density": 1.5}}, "'density' is 1.5; expected a number from 0 to 1"),
        ("ties", 2, {"parameters": {"density": [0.1, 0.2, 0.3]}}, "3 values given for 'density' and 2 models"),
        ("ties", 2, {"parameters": {"normalize": 1}}, "'normalize' is 1; expected true or false"),
        ("ties", 2, {"parameters": {"lambda": [1.0, 2.0]}}, "'lambda' is one for all models"),
        ("ties", 2, {"parameters": {"lambda": "much"}}, "'lambda' is 'much'; expected a number"),
        ("karcher", 2, {"parameters": {"max_iter": 2.5}}, "'max_iter' is 2.5; expected a whole number from 1"),
        ("linear", 2, {"parameters": {"density": 0.5}}, "'linear' has no parameter 'density'; it takes none"),
        ("slerp", 3, {}, "'slerp' merges 2 models, got 3.*karcher"),
        ("linear", 3, {"weights": [0.5, 0.5]}, "2 weights given .* for 3 models"),
        ("linear", 2, {"weights": [0.5, 0.6]}, "sum to 1.1"),
        ("ties", 2, {"weights": [0.5, math.inf]}, "weights 0.5 . inf cannot be used"),
    ],
)
def test_settings_that_are_refused(name: str, models: int, told: dict[str, Any], match: str) -> None:
    with pytest.raises(MergeidError, match=match):
        MergeSettings.of(get_method(name), models, ["layer.0.weight"], **told)
