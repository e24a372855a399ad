"""Merged in pieces is merged: totals, quantiles, files, and what is no number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import merge_checkpoints
from safetensors.torch import load_file, save_file

from mergeid.combine.by_torch import combine, is_finite, whole
from mergeid.errors import MergeidError
from mergeid.methods import pieces, quantiles
from mergeid.methods.pieces import added_up, in_pieces
from mergeid.methods.quantiles import at_places
from mergeid.methods.registry import MergeMethod, get_method, method_names
from mergeid.methods.settings import MergeSettings
from mergeid.methods.spherical import angle

ALL = [name for name in sorted(method_names()) if not get_method(name).statistics]
"""Methods that need no calibration data."""
few = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@few
@given(data=st.data(), wide=st.booleans(), signed=st.booleans(), chunk=st.integers(1, 9), gather=st.integers(0, 4))
def test_quantiles_are_those_of_the_sorted_numbers(
    data: st.DataObject, wide: bool, signed: bool, chunk: int, gather: int
) -> None:
    """Ties, infinities, subnormal numbers, whatever is picked out or counted to the last bit."""
    bits = 64 if wide else 32
    number = st.floats(width=bits, allow_nan=False) if signed else st.floats(0, width=bits, allow_nan=False)
    known = data.draw(st.lists(number, min_size=1, max_size=4))
    numbers = data.draw(st.lists(st.one_of(number, st.sampled_from(known)), min_size=1, max_size=40))
    dtype = torch.float64 if wide else torch.float32
    values = torch.tensor(numbers, dtype=dtype) if signed else torch.tensor(numbers, dtype=dtype).abs()
    ranks = data.draw(st.lists(st.integers(0, len(numbers) - 1), min_size=1, max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "GATHER", gather)
        found = at_places(lambda: values.split(chunk), ranks, dtype, signed=signed)
    assert found == [float(np.sort(values.numpy())[r]) for r in ranks]


def test_quantiles_of_bfloat16_differences_tie_often() -> None:
    """A million differences with some hundred values: half of them in one bin, none of which is picked out."""
    generator = torch.Generator().manual_seed(0)
    delta = (torch.randint(-120, 120, (1_000_000,), generator=generator) * 2.0**-14).abs()
    delta[: len(delta) // 2] = 2.0**-14
    ordered = delta.sort().values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "GATHER", 1000)
        ranks = [0, 250_000, 500_001, 999_999]
        assert at_places(lambda: delta.split(32768), ranks, torch.float32) == ordered[ranks].tolist()


@few
@given(size=st.integers(0, 50), chunk=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_totals_and_pieces_of_odd_sizes(size: int, chunk: int, seed: int) -> None:
    x, y = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", chunk)
        formed = in_pieces([x, y], torch.float32, lambda _, p: p[0] * p[1])
        found = added_up([x, y], lambda _, p: [(p[0] * p[1]).sum(), p[0].abs().sum()])
        assert torch.equal(formed.whole(), (x * y).to(torch.float32))
        assert [len(p) for p in formed] == [min(chunk, size - at) for at in range(0, size, chunk)]
    wanted = [(x * y).sum().item(), x.abs().sum().item()] if size else []
    assert found.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_what_is_no_number_is_seen(dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(x) and is_finite(-x) and is_finite(x[:0]) and is_finite(x.T)
        x[1, 2] = bad
        assert not is_finite(x) and not is_finite(x.T[1:])


def settings_of(method: MergeMethod) -> dict[str, Any]:
    """What every method is given: its defaults, half the density, a tenth of the outliers."""
    own = {"density": 0.5, "select_topk": 0.6, "gamma": 0.1, "filter_wise": True, "rescale": True, "task": 1}
    names = [p.name for p in method.parameters]
    return {n: own[n] for n in names if n in own}


def models(folder: Path, method: MergeMethod, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[Path]:
    """Models and, last, the base that they come from."""
    count = min(method.most or 3, 3)
    generator = torch.Generator().manual_seed(1)
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    places = []
    for i in range(count + 1):
        moved = {n: t + (i < count) * 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        places.append(folder / f"{i}.safetensors")
        save_file({n: t.to(dtype) for n, t in moved.items()}, places[-1])
    return places


SHAPES = {"odd": (7, 9), "long": (101,), "deep": (4, 3, 3, 2), "one": (1, 1), "none": (0, 4), "scalar": ()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_streamed_is_in_memory_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From file to file in pieces of seven elements, and in one call: any method, any shape."""
    monkeypatch.setattr(pieces, "CHUNK", 7)
    method = get_method(name)
    *places, base = models(tmp_path, method, SHAPES, dtype)
    origin = base if method.base is True else None
    if method.most == 1:
        places.append(places[0])
        return
    told = settings_of(method)
    merge_checkpoints(places[0], places[1], tmp_path / "o.safetensors", more=places[2:], base=origin, method=name,
                      parameters=told, seed=5)  # fmt: skip
    found = load_file(tmp_path / "o.safetensors")
    inputs, start = [load_file(p) for p in places], load_file(base)
    asked = MergeSettings.of(method, len(inputs), found, parameters=told, seed=5)
    for key, tensor in found.items():
        wanted = whole(combine(asked, key, [x[key] for x in inputs], start[key] if origin else None), inputs[0][key])
        assert torch.equal(tensor, wanted), key


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ALL)
def test_no_method_hides_what_is_no_number(name: str, bad: float, tmp_path: Path) -> None:
    """In any model, or in the base, at any of some places: the merge is refused, and names the tensor and the file."""
    method = get_method(name)
    if method.most == 1:
        return
    *places, base = models(tmp_path, method, {"w": (6, 8)}, torch.bfloat16)
    origin = [base] if method.base is True else []
    for k, place in enumerate([*places, *origin]):
        good = load_file(place)
        for at in (0, 13, 47):
            save_file({"w": good["w"].flatten().index_fill(0, torch.tensor(at), bad).reshape(6, 8)}, place)
            with pytest.raises(MergeidError, match=rf"(?s)'w'.*{place.name}"):
                merge_checkpoints(places[0], places[1], tmp_path / "o", more=places[2:],
                                  base=origin[0] if origin else None, method=name,
                                  parameters=settings_of(method), seed=k)  # fmt: skip
            assert not (tmp_path / "o").exists()
        save_file(good, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-22, 3e18])
def test_angles_of_tiny_and_huge_weights(dtype: torch.dtype, scale: float) -> None:
    """Squares that float32 cannot hold are taken in float64; opposite tensors are opposite whatever their lengths."""
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(2)) * scale).to(dtype)
    y = (torch.randn(1000, generator=torch.Generator().manual_seed(3)) * scale).to(dtype)
    a, b = x.double().numpy(), y.double().numpy()
    wanted = math.acos(float(a @ b / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b))))
    assert angle(x, y) == pytest.approx(wanted, abs=1e-6)
    assert angle(x, -4 * x) == pytest.approx(math.pi, abs=1e-7)
    assert angle(x, 4 * x) == pytest.approx(0, abs=1e-3)
    merged = get_method("slerp")([x, -4 * x], [0.3, 0.7])
    torch.testing.assert_close(merged, (-2.5 * x.double()).to(dtype))


def test_threads_are_given_back() -> None:
    """Pieces are made in one thread: afterwards there are as many as before, in whatever order the loops end."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one, two = (pieces.places(10, 2) for _ in range(2))
        assert (next(one), next(two)) == (slice(0, 2), slice(0, 2))
        assert torch.get_num_threads() == 1
        assert [s.start for s in one] == [2, 4, 6, 8]
        assert torch.get_num_threads() == 1
        del two  # left half way
        assert torch.get_num_threads() == 3
        assert next(pieces.places(3, 2)) == slice(0, 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
