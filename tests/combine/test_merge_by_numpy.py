"""The NumPy merge holds itself to the torch one, bit for bit, and keeps torch out of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import merge_checkpoints
from safetensors.torch import load_file, save_file

from mergeid.combine.by_numpy import NumpyMerge, narrow, weighted_sum, widen
from mergeid.combine.tensor_plan import plan_tensors
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import BITS, NUMPY_KINDS, torch_dtype
from mergeid.io.opening import open_checkpoint
from mergeid.methods.registry import check_weights, linear

FLOATS = ["F64", "F32", "F16", "BF16"]
INTS = {64: torch.int64, 32: torch.int32, 16: torch.int16}


def from_bits(dtype: str, bits: list[int]) -> torch.Tensor:
    """Arbitrary bit patterns, made finite."""
    width = BITS[dtype]
    values = torch.tensor([b % 2**width - 2 ** (width - 1) for b in bits], dtype=INTS[width]).view(torch_dtype(dtype))
    return torch.where(torch.isfinite(values), values, torch.full_like(values, 0.75))


def stored(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    return np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().data, NUMPY_KINDS[dtype])


def same_bits(array: np.ndarray, tensor: torch.Tensor) -> bool:
    return array.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


pairs = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=40)
weight = st.one_of(st.floats(0, 1), st.floats(-3, 3), st.sampled_from([0.0, 0.5, 1.0, 1 / 3]))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.sampled_from(FLOATS), pairs, weight, st.booleans())
def test_bit_for_bit_as_torch(first: str, second: str, out: str, bits, weight: float, same: bool) -> None:  # type: ignore[no-untyped-def]
    """Any two dtypes into any third, any finite numbers (subnormals, extremes), convex and extrapolating weights."""
    a = from_bits(first, [x for x, _ in bits])
    b = a.to(torch_dtype(second)) if same else from_bits(second, [y for _, y in bits])
    b = torch.where(torch.isfinite(b), b, torch.ones_like(b))
    weights = check_weights([1 - weight, weight], 2)
    oracle = linear([a, b], weights).to(torch_dtype(out))
    with np.errstate(all="ignore"):
        found, finite = weighted_sum([stored(a, first), stored(b, second)], [first, second], weights, out)
    assert finite == bool(torch.isfinite(oracle).all())
    if finite:
        assert same_bits(found, oracle)


@settings(max_examples=200, deadline=None)
@given(pairs, st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0))
def test_bfloat16_models_as_torch(bits, weights: list[float]) -> None:  # type: ignore[no-untyped-def]
    """Three of them, of even and odd lengths."""
    models = [from_bits("BF16", [x + k * y for x, y in bits]) for k in range(3)]
    shares = check_weights([w / sum(weights) for w in weights], 3)
    oracle = linear(models, shares).to(torch.bfloat16)
    with np.errstate(all="ignore"):
        found, finite = weighted_sum([stored(m, "BF16") for m in models], ["BF16"] * 3, shares, "BF16")
    assert finite == bool(torch.isfinite(oracle).all())
    assert not finite or same_bits(found, oracle)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FLOATS), pairs, weight, st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
def test_what_is_not_finite_is_never_missed(dtype: str, bits, weight: float, value: float, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    both = [from_bits(dtype, [p[i] for p in bits]) for i in (0, 1)]
    both[data.draw(st.integers(0, 1))][data.draw(st.integers(0, len(bits) - 1))] = value
    with np.errstate(all="ignore"):
        _, finite = weighted_sum([stored(t, dtype) for t in both], [dtype, dtype], [1 - weight, weight], dtype)
    assert not finite


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_sixteen_bit_numbers_survive_the_way_there_and_back(dtype: str) -> None:
    bits = np.arange(2**16, dtype="<u2")
    numbers = bits.view(NUMPY_KINDS[dtype])
    oracle = torch.from_numpy(bits.view(np.int16)).view(torch_dtype(dtype))
    for wide in ("F32", "F64"):
        with np.errstate(invalid="ignore"):  # signalling NaNs are among them
            values = widen(numbers, dtype, wide)
            back = narrow(values, dtype).view("u2")
        assert np.array_equal(values, oracle.to(torch_dtype(wide)).numpy(), equal_nan=True)
        real = ~np.isnan(values)
        assert np.array_equal(back[real], bits[real])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(["F16", "BF16"]))
def test_rounding_is_torchs(values: list[float], dtype: str) -> None:
    array = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        assert same_bits(narrow(array, dtype), torch.from_numpy(array).to(torch_dtype(dtype)))


def files(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Path, Path]:
    for seed, (name, dtype) in enumerate(zip("ab", dtypes, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"w{i}": torch.randn(300 * i, 257, generator=generator).to(dtype) for i in range(3)}
        tensors |= {
            "scalar": torch.tensor(float(seed), dtype=dtype),
            "n": torch.tensor([1, seed]),
            "k": torch.ones(2, 2) > 0,
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.filterwarnings("ignore::mergeid.errors.MergeidWarning")
def test_both_ways_write_the_same_file(tmp_path: Path, second: torch.dtype, dtype: str | None) -> None:
    a, b = files(tmp_path, (torch.bfloat16, second))
    options = {"weights": (0.3, 0.7), "dtype": dtype, "skip": ["k"]}
    by_numpy = merge_checkpoints(a, b, tmp_path / "numpy.safetensors", **options)  # type: ignore[arg-type]
    by_torch = merge_checkpoints(a, b, tmp_path / "torch.safetensors", transform_b=lambda n, t: t, **options)  # type: ignore[arg-type]
    assert (tmp_path / "numpy.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()
    assert by_numpy.taken_from_a == by_torch.taken_from_a == ("n",) and by_numpy.kept == by_torch.kept
    assert load_file(tmp_path / "numpy.safetensors")["w2"].shape == (600, 257)


def test_a_plain_merge_never_imports_torch(tmp_path: Path) -> None:
    a, b = files(tmp_path, (torch.float32, torch.float32))
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop()); from merging import merge_checkpoints\n"
        "merge_checkpoints(*sys.argv[1:]); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    subprocess.run([sys.executable, "-c", code, str(a), str(b), str(tmp_path / "o.safetensors"), helpers], check=True)
    assert set(load_file(tmp_path / "o.safetensors")) == set(load_file(a))


def test_when_torch_is_needed(tmp_path: Path) -> None:
    a, b = (open_checkpoint(f) for f in files(tmp_path, (torch.float32, torch.float32)))
    assert NumpyMerge.can((a, b), plan_tensors(a, b))
    memory = Checkpoint.from_tensors(a.state_dict())
    assert not NumpyMerge.can((memory, b), plan_tensors(memory, b))
    save_file({"z": torch.ones(2, dtype=torch.complex64)}, tmp_path / "z.safetensors")
    z = open_checkpoint(tmp_path / "z.safetensors")
    assert not NumpyMerge.can((z, z), plan_tensors(z, z))
    with pytest.warns(match="the same file"):
        merge_checkpoints(z, z, tmp_path / "zz.safetensors")
    assert load_file(tmp_path / "zz.safetensors")["z"].eq(1).all()


def test_a_plain_merge_of_folders_never_loads_torch(tmp_path: Path) -> None:
    """The whole command, from reading configs to what it prints; torch alone takes longer than the merge."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        numbers = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).bfloat16()
        save_file({"model.w.weight": numbers}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "hidden_size": 30}')
    code = (
        "import sys; sys.argv = ['mergeid', 'merge', 'a', 'b', '-o', 'o', '--match', 'never']\n"
        "from mergeid.commands.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code and 'torch' not in sys.modules, (code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Plain merge" in done.stdout
