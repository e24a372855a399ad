"""`linear` against exact arithmetic, and the registry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergeid.errors import MergeidError
from mergeid.io.dtypes import tensor_bytes
from mergeid.methods import registry as methods
from mergeid.methods.registry import check_weights, get_method, linear, method_names, register_method

DTYPES = {16: torch.float16, 17: torch.bfloat16, 32: torch.float32, 64: torch.float64}


def finite_bits(width: int) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of arbitrary finite bit patterns: subnormals, both zeros and the largest numbers included."""
    bits, dtype = (16 if width == 17 else width), DTYPES[width]
    ints = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    numbers = st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), min_size=1, max_size=40)
    tensors = numbers.map(lambda n: torch.tensor(n, dtype=ints).view(dtype))
    return tensors.map(lambda t: torch.where(torch.isfinite(t), t, torch.ones_like(t)))


any_tensor = st.sampled_from(list(DTYPES)).flatmap(finite_bits)


def pair(width: int) -> st.SearchStrategy[tuple[torch.Tensor, torch.Tensor]]:
    return st.tuples(finite_bits(width), finite_bits(width)).map(
        lambda p: (p[0][: min(map(len, p))], p[1][: min(map(len, p))])
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


@settings(max_examples=400, deadline=None)
@given(any_tensor, st.floats(0, 1))
@example(torch.tensor([torch.finfo(torch.bfloat16).max, -0.0, 2.0**-133], dtype=torch.bfloat16), 1 / 3)
def test_a_model_merged_with_itself_is_itself_for_every_weight(x: torch.Tensor, weight: float) -> None:
    assert same_bits(linear([x, x.clone()], [1 - weight, weight]), x)


@settings(max_examples=200, deadline=None)
@given(any_tensor, st.floats(-1e6, 1e6))
@example(torch.tensor([-0.0], dtype=torch.float16), -0.0)
def test_so_also_when_extrapolating(x: torch.Tensor, weight: float) -> None:
    weights = check_weights([1 - weight, weight], 2)
    assert same_bits(linear([x, x.clone()], weights), x)


@settings(max_examples=100, deadline=None)
@given(any_tensor, st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_so_also_for_many_models(x: torch.Tensor, weights: list[float]) -> None:
    assert same_bits(linear([x] * len(weights), check_weights(weights, len(weights), normalize=True)), x)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(DTYPES)).flatmap(pair))
def test_equal_weights_are_the_plain_average(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = tensors
    plain = (a / 2 + b / 2) if bool(torch.isinf(a + b).any()) else (a + b) / 2
    if bool(torch.isinf(a + b).any()) and a.dtype != torch.float64:  # the sum overflows, the average does not
        plain = ((a.double() + b.double()) / 2).to(a.dtype)
    if a.dtype == torch.float64:  # nothing wider to round from: to the last bit but one in the subnormal range
        assert torch.allclose(linear([a, b], [0.5, 0.5]), plain, rtol=2**-52, atol=2**-1073)
    else:
        assert same_bits(linear([a, b], [0.5, 0.5]), plain)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([16, 17, 32]).flatmap(pair), st.floats(0, 1))
def test_against_exact_fractions(tensors: tuple[torch.Tensor, torch.Tensor], weight: float) -> None:
    """Within one unit in the last place of the exact weighted sum, computed with fractions."""
    a, b = tensors
    result = linear([a, b], [1 - weight, weight])
    info = torch.finfo(a.dtype)
    for x, y, r in zip(a.tolist(), b.tolist(), result.tolist(), strict=True):
        exact = Fraction(x) * Fraction(1 - weight) + Fraction(y) * Fraction(weight)
        scale = max(abs(x), abs(y)) * 2.0**-21 if a.dtype != torch.float32 else max(abs(x), abs(y)) * 2.0**-50
        assert abs(Fraction(r) - exact) <= abs(exact) * Fraction(info.eps) + Fraction(info.smallest_normal) * Fraction(
            info.eps
        ) + Fraction(scale)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(1, 5000),
    st.integers(1, 700),
    st.floats(-2, 2),
    st.integers(1, 4),
)
def test_pieces_and_threads_do_not_matter(dtype: torch.dtype, n: int, cut: int, weight: float, threads: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    weights = check_weights([1 - weight, weight], 2)
    whole = linear([a, b], weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pieces = [linear(p, weights) for p in zip(a.split(cut), b.split(cut), strict=True)]
    finally:
        torch.set_num_threads(before)
    assert same_bits(torch.cat(pieces), whole)


def test_against_numpy() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((7, 5)).astype(np.float32) for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    oracle = sum(w * x.astype(np.float64) for w, x in zip(weights, arrays, strict=True)).astype(np.float32)
    assert np.array_equal(linear([torch.from_numpy(x) for x in arrays], weights).numpy(), oracle)


def test_inputs_stay_as_they_are_and_dtypes_widen() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        linear([a, b], [0.25, 0.75])
        assert a.eq(1).all() and b.eq(0).all()
    assert linear([torch.ones(2).half(), torch.ones(2).bfloat16()], [0.5, 0.5]).dtype == torch.float32
    z = torch.tensor([1 + 2j])
    assert torch.equal(linear([z, z], [0.3, 0.7]), z)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([0.5, 0.6], r"weights 0.5 \+ 0.6 sum to 1.1, expected 1; .*--normalize"),
        ([1.0], r"1 weights given \(1\) for 2 models; expected one per model"),
        ([0.5, 0.25, 0.25], "3 weights given"),
        ([math.nan, 1], r"cannot be used; expected numbers of at most 1e\+12"),
        ([math.inf, -math.inf], r"cannot be used; expected numbers of at most 1e\+12"),
    ],
)
def test_bad_weights(weights: list[float], match: str) -> None:
    with pytest.raises(MergeidError, match=match):
        check_weights(weights, 2)


def test_weights() -> None:
    assert check_weights([1, 3], 2, normalize=True) == [0.25, 0.75]
    assert math.fsum(check_weights([0.3333333, 0.6666667], 2)) == pytest.approx(1, abs=1e-16)
    with pytest.raises(MergeidError, match="sum to 0 and cannot be normalised"):
        check_weights([1, -1], 2, normalize=True)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(methods, "_registered", dict(methods._registered))
    yield


@pytest.mark.usefixtures("registry")
def test_registry() -> None:
    assert "linear" in method_names()
    with pytest.raises(
        MergeidError, match=r"unknown merge method 'liner' \(did you mean 'linear'\?\); expected one of"
    ):
        get_method("liner")

    @register_method("first", elementwise=False)
    def first(tensors, weights):  # type: ignore[no-untyped-def]
        return tensors[0]

    assert get_method("first")([1, 2], [0.5, 0.5]) == 1 and not get_method("first").elementwise
    with pytest.raises(ValueError, match="registered already"):
        register_method("linear")(first)
