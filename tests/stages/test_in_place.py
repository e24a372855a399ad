"""Fine-tunes are recognised from their rows alone; other networks, and neurons that were moved, are not missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mergeid
import mergeid.combine.in_place as rows_in_place
from mergeid.combine.in_place import NEARER, NEXT_TO_NOTHING, OTHERS, _Stored, _totals, _window, in_place
from mergeid.io.checkpoint import Checkpoint
from mergeid.models import workbench

State = dict[str, torch.Tensor]


def checkpoint(state: State) -> Checkpoint:
    return Checkpoint.from_tensors(state)


def network(seed: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> State:
    """Weights of two layers and a convolution, rows alike in what they have in common."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "0.weight": (40, 24),
        "0.bias": (40,),
        "1.weight": (12, 40),
        "2.weight": (12, 8, 3, 3),
        "3.weight": (1, 9),
    }
    return {n: (torch.randn(s, generator=generator) + mean).to(dtype) for n, s in shapes.items()}


def tuned(state: State, seed: int, size: float = 0.1) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fine_tunes_fit(dtype: torch.dtype) -> None:
    base = network(0, dtype=dtype)
    found = in_place(checkpoint(tuned(base, 1)), checkpoint(tuned(base, 2)), list(base), 0)
    assert found.whole and not found.astray
    assert found.rows == 40 + 24 + 12 + 40 + 12 + 8 + 3 + 3 and len(found.axes) == 8, "vectors tell nothing"
    assert 0 < found.ratio <= np.sqrt(NEARER)


@given(seed=st.integers(0, 999), mean=st.sampled_from([0.0, 1.0, 10.0]), scale=st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_independent_networks_never_pass(seed: int, mean: float, scale: float) -> None:
    """Also where all rows have so much in common that every cosine is near one."""
    a, b = network(seed, mean), network(seed + 1000, mean)
    found = in_place(checkpoint(a), checkpoint({n: scale * t for n, t in b.items()}), list(a), seed)
    assert found.astray and not found.whole


@given(
    seed=st.integers(0, 999),
    axis=st.sampled_from([("0.weight", 0), ("0.weight", 1), ("1.weight", 0), ("1.weight", 1), ("2.weight", 1)]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_two_rows_that_changed_places_are_found_and_no_others(
    seed: int, axis: tuple[str, int], data: st.DataObject
) -> None:
    base = network(seed)
    a, b = tuned(base, seed + 1), tuned(base, seed + 2)
    name, dim = axis
    i, j = data.draw(st.lists(st.integers(0, base[name].shape[dim] - 1), min_size=2, max_size=2, unique=True))
    order = torch.arange(base[name].shape[dim])
    order[[i, j]] = order[[j, i]]
    b[name] = b[name].index_select(dim, order)
    found = in_place(checkpoint(a), checkpoint(b), list(base), seed)
    assert found.astray[axis] == tuple(sorted((i, j)))


@given(seed=st.integers(0, 99), count=st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_the_nearest_of_the_others_is_the_naive_one(seed: int, count: int) -> None:
    """Every row against the very rows that are drawn, one by one; windows are whole rows here."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, 20, generator=generator)
    b = a + 0.5 * torch.randn(count, 20, generator=generator)
    everything = {"w": a}
    found = in_place(checkpoint(everything), checkpoint({"w": b}), ["w"], seed)
    fits = next(f for f in found.axes if f.axis == 0)
    apart = ((a.double()[None] - b.double()[:, None]) ** 2).sum(-1).numpy()
    own = apart.diagonal()
    nearest_of_all = np.where(np.eye(count, dtype=bool), np.inf, apart).min(1)
    for i in range(count):
        if own[i] <= 0.999 * NEARER * nearest_of_all[i] and own[i] < 0.4 * float((b[i] ** 2).sum()):
            assert i not in fits.astray, "nearer than to any other, drawn or not"
        if own[i] > NEARER * apart[i].max() and own[i] > 4 * NEXT_TO_NOTHING * apart.mean():
            assert i in fits.astray
    if count <= 16:  # all others are drawn
        for i in range(count):
            if own[i] > 1.001 * NEARER * nearest_of_all[i] and own[i] > 4 * NEXT_TO_NOTHING * apart.mean():
                assert i in fits.astray


def test_rows_that_are_alike_or_nothing_do_no_harm() -> None:
    """Tokens that no text had, and neurons that died: their own place is as good as another."""
    base = network(3)
    base["0.weight"][5:20] = 0
    base["0.weight"][20:30] = base["0.weight"][20]
    a, b = tuned(base, 1, 0.02), tuned(base, 2, 0.02)
    assert not in_place(checkpoint(a), checkpoint(b), list(base), 0).astray


def test_weights_that_are_no_numbers_fit_nowhere() -> None:
    base = network(4)
    other = tuned(base, 1)
    other["0.weight"][7, 3] = float("nan")
    assert 7 in in_place(checkpoint(base), checkpoint(other), list(base), 0).astray["0.weight", 0]


def test_signs_and_scales_are_not_in_place() -> None:
    """A neuron with its sign turned, or ten times as large, is another row."""
    base = network(5)
    other = {n: t.clone() for n, t in base.items()}
    other["0.weight"][3] *= -1
    other["0.weight"][9] *= 10
    assert in_place(checkpoint(base), checkpoint(other), list(base), 0).astray["0.weight", 0] == (3, 9)


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes `a`, `b` of one tiny Llama, and another Llama `c`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    for seed, names in ((0, "ab"), (1, "c")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for i, name in enumerate(names):
            model.load_state_dict(tuned(model.state_dict(), 10 + i, 0.002), strict=False)
            model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a workbench builds."""
    seen: list[str] = []
    for what in ("load", "graph"):
        real = getattr(workbench.Workbench, what)

        def watched(bench: Any, *given: Any, real: Any = real, what: str = what) -> Any:
            seen.append(what)
            return real(bench, *given)

        monkeypatch.setattr(workbench.Workbench, what, watched)
    return seen


def test_a_default_merge_of_fine_tunes_builds_nothing(llamas: Path, tmp_path: Path, built: list[str]) -> None:
    found = mergeid.merge(llamas / "a", llamas / "b", output=tmp_path / "o")
    plain = mergeid.merge(llamas / "a", llamas / "b", output=tmp_path / "p", match="never")
    assert found.verdict == "direct" and not found.plans and not built
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "p/model.safetensors").read_bytes()
    record = json.loads((tmp_path / "o/mergeid.json").read_text())
    ((_, told),) = record["in_place"].items()
    assert told["astray"] == 0 and told["rows"] > 1000 and told["largest_ratio"] < 0.5
    assert "lies nearer to its own place in the first model" in found.notes[-1]
    assert "in_place" not in json.loads((tmp_path / "p/mergeid.json").read_text()) and plain.in_place is None


def test_two_neurons_swapped_by_hand_are_matched_and_nothing_else(
    llamas: Path, tmp_path: Path, built: list[str]
) -> None:
    state = load_file(llamas / "b/model.safetensors")
    order = torch.arange(80)
    order[[3, 71]] = order[[71, 3]]
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        state[name] = state[name].index_select(dim, order).contiguous()
    swapped = tmp_path / "b"
    swapped.mkdir()
    save_file(state, swapped / "model.safetensors", metadata={"format": "pt"})
    (swapped / "config.json").write_bytes((llamas / "b/config.json").read_bytes())
    found = mergeid.merge(llamas / "a", swapped, output=tmp_path / "o")
    plain = mergeid.merge(llamas / "a", llamas / "b", output=tmp_path / "p", match="never")
    assert found.verdict == "match" and found.plan is not None and plain.verdict == "direct"
    assert len(found.plan.spaces) == 1 and found.plan.spaces[0].size == 80 and found.plan.spaces[0].moved == 2
    assert "6 of " in found.notes[-1] and "were planned" in found.notes[-1]
    ours, wanted = (load_file(tmp_path / x / "model.safetensors") for x in "op")
    assert all(torch.equal(ours[n], wanted[n]) for n in wanted)


def test_independent_models_are_planned_whole(llamas: Path, tmp_path: Path, built: list[str]) -> None:
    found = mergeid.merge(llamas / "a", llamas / "c", output=tmp_path / "o")
    assert found.plan is not None and len(found.plan.spaces) > 5 and found.in_place is None
    assert "graph" in built


@pytest.mark.parametrize("tile", [16, 1 << 20])
@pytest.mark.parametrize("shape", [(7, 5), (40, 3), (6, 5, 3)])
def test_distances_of_rows_are_those_of_loops_however_large_the_tiles(
    shape: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_in_place, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for _ in range(2))
    stored = [_Stored.of(checkpoint({"w": t}), "w") for t in (a, b)]
    totals = _totals(*stored)
    for axis, count in enumerate(shape):
        one, two = (t.movedim(axis, 0).reshape(count, -1).double().numpy() for t in (a, b))
        apart, lengths = totals[axis]
        np.testing.assert_allclose(apart, ((one - two) ** 2).sum(1), rtol=1e-5)
        np.testing.assert_allclose(lengths, (two**2).sum(1), rtol=1e-5)
        own, nearest, usual, rescaled = _window(*stored, axis, np.random.default_rng(1))
        sample = np.sort(np.random.default_rng(1).choice(count, min(OTHERS, count), replace=False))
        far = [[((two[i] - one[j]) ** 2).sum() for j in sample if j != i] for i in range(count)]
        np.testing.assert_allclose(own, ((one - two) ** 2).sum(1), rtol=1e-4)
        np.testing.assert_allclose(nearest, [min(f) for f in far], rtol=1e-4)
        assert not rescaled
        assert usual == pytest.approx(np.mean([d for f in far for d in f]), rel=1e-4)
