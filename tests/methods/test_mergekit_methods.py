"""The methods that mergekit has too, against naive loops written from their formulas (`tests/bench/mergekit_methods.py`
compares with mergekit itself)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergeid.errors import MergeidError
from mergeid.methods import pieces, sparse
from mergeid.methods.arcee_fusion import threshold
from mergeid.methods.breadcrumbs import between
from mergeid.methods.builtin import della as della_module
from mergeid.methods.della import keep_probability
from mergeid.methods.pieces import in_pieces
from mergeid.methods.registry import get_method

Array = np.ndarray
SEEDS = range(6)


def draw(seed: int, *shape: int, count: int = 1, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def arrays(tensors: Sequence[torch.Tensor]) -> list[Array]:
    return [t.numpy() for t in tensors]


def merge(name: str, tensors: Sequence[torch.Tensor], weights: Sequence[float], **needs: Any) -> Array:
    return get_method(name)(tensors, weights, **needs).numpy()


# --- task vectors of which a part is kept ------------------------------------------------------------------------


def naive_sparse(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], elect: bool, normalize: bool, scale: float
) -> Array:
    """Weighted deltas, masked and rescaled already, element by element."""
    out = base.copy()
    for i in np.ndindex(*base.shape):
        values = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        sign = 1.0 if sum(values) >= 0 else -1.0
        used = [(w, v) for w, v in zip(weights, values, strict=True) if not elect or v * sign > 0]
        divisor = sum(w for w, _ in used) if normalize else 1.0
        out[i] += scale * sum(v for _, v in used) / (divisor or 1.0)
    return out


def norm(x: Array, kind: str) -> float:
    return float({"l1": np.abs(x).sum(), "l2": np.sqrt((x**2).sum()), "linf": np.abs(x).max()}[kind])


class Given:
    """Numbers from a list instead of random ones, the same at every reading."""

    left: Iterator[torch.Tensor]

    def __init__(self, generator: torch.Generator | None) -> None:
        self.numbers = next(self.left)

    def begin(self) -> Callable[[int], torch.Tensor]:
        numbers = iter(self.numbers)
        return lambda count: torch.stack([next(numbers) for _ in range(count)])


@pytest.mark.parametrize("kind", ["probability", "l1", "l2", "linf"])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_dare_and_della_with_the_masks_given(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers from a list of ours stand for the random ones."""
    base, *tensors = draw(3, 5, 8, count=4)
    density, epsilon, weights = [0.3, 0.5, 0.7], [0.1, 0.2, 0.25], [0.4, 0.9, -0.3]
    uniform = [torch.rand(40, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    monkeypatch.setattr(sparse, "Uniform", Given)
    monkeypatch.setattr(della_module, "Uniform", Given)
    Given.left = iter(uniform)
    della = {"epsilon": epsilon} if "della" in name else {}
    told: dict[str, Any] = {"density": density, "rescale_norm": kind, "scale": 0.8, "normalize": True, **della}
    found = merge(name, tensors, weights, base=base, **told)

    b, *x = arrays([base, *tensors])
    deltas = []
    for tensor, share, spread, draws in zip(x, density, epsilon, arrays(uniform), strict=True):
        delta, chance = tensor - b, np.full(b.shape, share)
        if della:
            for r, row in enumerate(delta):
                for place, column in enumerate(sorted(range(8), key=lambda c, row=row: abs(row[c]))):
                    chance[r, column] = share - spread + 2 * spread * place / 7
        kept = np.where(draws.reshape(b.shape) < chance, delta, 0.0)
        deltas.append(kept / chance if kind == "probability" else kept * norm(delta, kind) / norm(kept, kind))
    elect = name in ("dare_ties", "della")
    expected = naive_sparse(b, deltas, weights, elect, True, 0.8)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # chances are float32


def test_della_keeps_the_expectation_and_the_largest_more_often() -> None:
    base = torch.zeros(1, 20_000)
    delta = torch.linspace(-1, 2, 20_000).reshape(1, -1)
    told = {"density": [0.4], "epsilon": [0.3], "generator": torch.Generator().manual_seed(1)}
    found = merge("della_linear", [delta], [1.0], base=base, **told)
    kept = found != 0
    large = np.abs(delta.numpy()) > 1
    assert kept.mean() == pytest.approx(0.4, abs=0.015) and kept[large].mean() > 1.8 * kept[~large].mean()
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    chance = keep_probability(delta, 0.4, 0.3)
    assert (float(chance.min()), float(chance.max())) == pytest.approx((0.1, 0.7))
    assert keep_probability(torch.ones(3, 1), 0.4, 0.3).tolist() == pytest.approx([0.4] * 3)
    with pytest.raises(MergeidError, match=r"density 0.9 with epsilon 0.15 .* below 0.1"):
        merge("della", [delta], [1.0], base=base, density=[0.9], epsilon=[0.15])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("elect", [False, True])
def test_breadcrumbs(seed: int, elect: bool) -> None:
    base, *tensors = draw(seed, 6, 7, count=4)
    density, gamma, weights = [0.2, 0.9, 0.5], [0.1, 0.2, 0.0], [0.4, 0.9, 0.3]
    told: dict[str, Any] = {"density": density, "gamma": gamma, "scale": 0.7, "normalize": elect, "rescale": elect}
    name = "breadcrumbs_ties" if elect else "breadcrumbs"
    found = merge(name, tensors, weights, base=base, **told)
    b, *x = arrays([base, *tensors])
    deltas = []
    for tensor, share, top in zip(x, density, gamma, strict=True):
        delta = tensor - b
        order = sorted(np.ndindex(*delta.shape), key=lambda i, delta=delta: abs(delta[i]))
        target = int(share * 42)
        low = max(0, 42 - target - int(top * 42))
        keep = set(order[low : low + target])
        kept = np.array([delta[i] if i in keep else 0.0 for i in np.ndindex(*delta.shape)]).reshape(delta.shape)
        deltas.append(kept * norm(delta, "l1") / norm(kept, "l1") if elect else kept)
    np.testing.assert_allclose(found, naive_sparse(b, deltas, weights, elect, elect, 0.7), rtol=1e-10, atol=1e-12)


def test_breadcrumbs_between() -> None:
    delta = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0])
    base = torch.zeros(5)
    assert between(delta, base, 1.0, 0.5, torch.float32) is None
    cases = ((0.4, 0.2, [1, 2]), (0.4, 0.0, [0, 1]), (0.8, 0.4, [1, 2, 3, 4]), (0.1, 0.0, []))
    for density, gamma, kept in cases:
        ends = between(delta, base, density, gamma, torch.float32)
        assert ends is not None
        found = (delta.abs() >= ends[0]) & (delta.abs() <= ends[1])
        assert torch.nonzero(found).reshape(-1).tolist() == kept
    assert between(torch.ones(4), torch.zeros(4), 0.5, 0.0, torch.float32) == (1, 1)


@pytest.mark.parametrize("kind", ["probability", "l1", "l2", "linf"])
def test_ties_rescaled(kind: str) -> None:
    base, *tensors = draw(8, 4, 5, count=3)
    found = merge("ties", tensors, [0.5, 1.5], base=base, density=[0.3, 0.6], rescale=True, rescale_norm=kind)
    b, *x = arrays([base, *tensors])
    deltas = []
    for tensor, share in zip(x, (0.3, 0.6), strict=True):
        delta = tensor - b
        cut = np.sort(np.abs(delta).reshape(-1))[-int(share * 20)]
        kept = np.where(np.abs(delta) >= cut, delta, 0)
        deltas.append(kept / share if kind == "probability" else kept * norm(delta, kind) / norm(kept, kind))
    np.testing.assert_allclose(found, naive_sparse(b, deltas, [0.5, 1.5], True, True, 1.0), rtol=1e-10)


# --- on the sphere -----------------------------------------------------------------------------------------------


def naive_slerp(a: Array, b: Array, t: float) -> Array:
    u, v = (x / max(float(np.linalg.norm(x)), 1e-7) for x in (a, b))
    cosine = min(1.0, max(-1.0, float(u @ v)))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["flat", "last", "first"])
@pytest.mark.parametrize("has_base", [False, True])
def test_nuslerp(seed: int, kind: str, has_base: bool) -> None:
    base, a, b = draw(seed, 4, 6, count=3)
    a[1] = 0 if not has_base else base[1]
    told = {"nuslerp_flatten": kind == "flat", "nuslerp_row_wise": kind == "first"}
    found = merge("nuslerp", [a, b], [0.7, 0.3], base=base if has_base else None, **told)
    origin = base.numpy() * has_base
    x, y = (t - origin for t in arrays([a, b]))
    if kind == "flat":
        expected = naive_slerp(x.reshape(-1), y.reshape(-1), 0.3).reshape(4, 6)
    elif kind == "last":
        expected = np.stack([naive_slerp(x[i], y[i], 0.3) for i in range(4)])
    else:
        expected = np.stack([naive_slerp(x[:, i], y[:, i], 0.3) for i in range(6)], 1)
    np.testing.assert_allclose(found, expected + origin, rtol=1e-9, atol=1e-12)


def naive_multislerp(vectors: Sequence[Array], weights: Sequence[float], eps: float = 1e-8) -> Array:
    """As the method is described: to the tangent space at the weighted mean of the directions, and back."""
    lengths = [float(np.linalg.norm(v)) for v in vectors]
    units = [v / (n + eps) for v, n in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - float(u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    angle = float(np.linalg.norm(tangent)) + eps
    on_sphere = mean * math.cos(angle) + tangent * math.sin(angle) / angle
    return on_sphere * sum(w * n for w, n in zip(weights, lengths, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_multislerp(seed: int, has_base: bool, normalize: bool) -> None:
    base, *tensors = draw(seed, 5, 4, count=4)
    weights = [0.5, 1.5, 0.7]
    told: dict[str, Any] = {"normalize_weights": normalize, "base": base if has_base else None}
    found = merge("multislerp", tensors, weights, **told)
    origin = base.numpy() * has_base
    shares = [w / sum(weights) if normalize else w for w in weights]
    expected = naive_multislerp([(x - origin).reshape(-1) for x in arrays(tensors)], shares)
    np.testing.assert_allclose(found, expected.reshape(5, 4) + origin, rtol=1e-7, atol=1e-10)
    a = tensors[0]
    assert not merge("multislerp", [a, -a], [0.5, 0.5]).any()
    assert not merge("multislerp", [0 * a, -0 * a, 0 * a], [0.5, 0.2, 0.3]).any()
    assert torch.equal(get_method("multislerp")([a], [2.0]), a)


# --- the rest ----------------------------------------------------------------------------------------------------


def naive_sce(base: Array, tensors: Sequence[Array], share: float) -> Array:
    deltas = np.stack([t - base for t in tensors])
    variance = deltas.var(0)
    order = sorted(np.ndindex(*base.shape), key=lambda i: -variance[i])
    keep = set(order[: int(np.count_nonzero(variance) * share)])
    if share < 1:
        for i in np.ndindex(*base.shape):
            if i not in keep:
                deltas[(slice(None), *i)] = 0
    squares = [float((d**2).mean()) for d in deltas]
    total = sum(squares)
    weights = [s / total if total >= 1e-6 else 1 / len(tensors) for s in squares]
    out = base.copy()
    for i in np.ndindex(*base.shape):
        values = deltas[(slice(None), *i)]
        sign = 1.0 if values.sum() >= 0 else -1.0
        used = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        out[i] += sum(w * v for w, v in used) / max(sum(w for w, _ in used), 1e-6)
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_sce(seed: int, share: float, size: float) -> None:
    (base,) = draw(seed, 6, 5)
    tensors = [base + d for d in draw(seed + 50, 6, 5, count=3, size=size)]
    found = merge("sce", tensors, [1 / 3] * 3, base=base, select_topk=share)
    np.testing.assert_allclose(found, naive_sce(base.numpy(), arrays(tensors), share), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(seed: int, name: str) -> None:
    base, *noise = draw(seed, 6, 7, count=4)
    masks = draw(seed + 9, 6, 7, count=3)
    tensors = [base + n * (m > 0.3) for n, m in zip(noise, masks, strict=True)]
    plus = name == "ramplus_tl"
    told = {"r": 0.5, "alpha": 0.6} if plus else {}
    found = merge(name, tensors, [1 / 3] * 3, base=base, epsilon=0.05, **told)
    b, *x = arrays([base, *tensors])
    changed = [np.abs(t - b) > 0.05 for t in x]
    count = sum(c.astype(int) for c in changed)
    expected = b.copy()
    for i in np.ndindex(*b.shape):
        for k, (t, c) in enumerate(zip(x, changed, strict=True)):
            if not c[i]:
                continue
            own, shared = int((changed[k] & (count == 1)).sum()), int((changed[k] & (count > 1)).sum())
            gain = 1 + 0.5 * min(shared / max(own, 1e-5), 0.6) if plus else 1.0
            expected[i] += (t[i] - b[i]) * (gain if count[i] == 1 else 1 / count[i])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_nearswap_moves_no_element_by_more_than_t() -> None:
    a, b = draw(1, 6, 7, count=2)
    b[0] = a[0] + 1e-9
    found = merge("nearswap", [a, b], [0.5, 0.5], t=0.2)
    x, y = arrays([a, b])
    assert np.abs(found - x).max() <= 0.2 + 1e-12
    near = np.abs(x - y) <= 0.2
    np.testing.assert_allclose(found[near], y[near], rtol=1e-12)
    np.testing.assert_allclose(found[~near], (x + 0.2 * np.sign(y - x))[~near], rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_arcee_fusion(seed: int) -> None:
    a, b = draw(seed, 6, 9, count=2)
    found = merge("arcee_fusion", [a, b], [0.5, 0.5])
    x, y = arrays([a, b])
    scores = np.empty_like(x)
    for r, (u, v) in enumerate(zip(x, y, strict=True)):
        p, q = (np.exp(z) / np.exp(z).sum() + 1e-8 for z in (v, u))
        scores[r] = np.abs(v - u) * (p * np.log(p / q)).sum()
    ordered = np.sort(scores.reshape(-1))
    low, middle, high = (ordered[int(s * 53)] for s in (0.25, 0.5, 0.75))
    np.testing.assert_allclose(found, np.where(scores >= middle + 1.5 * (high - low), y, x), rtol=1e-12)
    assert 0 < (found == x).mean() < 1
    assert threshold(in_pieces([torch.tensor([4.0])], torch.float32, lambda _, pieces: pieces[0])) == 4
    assert torch.equal(get_method("arcee_fusion")([a[0, 0], a[0, 0]], [0.5, 0.5]), a[0, 0])


def test_passthrough_scales() -> None:
    (a,) = draw(1, 3, 4)
    assert torch.equal(get_method("passthrough")([a], [1.0], scale=[1.0]), a)
    assert torch.equal(get_method("passthrough")([a], [1.0], scale=[0.25]), a / 4)


@pytest.mark.parametrize(
    "name", ["breadcrumbs", "breadcrumbs_ties", "della", "sce", "ramplus_tl", "arcee_fusion", "multislerp", "nuslerp"]
)
def test_pieces_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tensors = draw(20, 30, 40, count=4)
    method = get_method(name)
    tensors = tensors[: method.most or 3]
    told = {p.keyword or p.name: [p.default] * len(tensors) for p in method.parameters if p.per_model}
    told |= {"base": base} if method.base else {}
    found = []
    for size in (1 << 18, 7, 100):
        monkeypatch.setattr(pieces, "CHUNK", size)
        if "density" in told:
            told["density"] = [0.5] * len(tensors)
        if method.seeded:
            told["generator"] = torch.Generator().manual_seed(1)
        found.append(merge(name, tensors, [1 / len(tensors)] * len(tensors), **told))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-12, atol=1e-12)
