"""Merges of three models, file to file: both ways to compute them, number formats, and what is named on errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import mergeid
from merging import merge_checkpoints
from safetensors.torch import load_file, save_file

from mergeid.combine.tensor_plan import plan_many
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.dtypes import tensor_bytes
from mergeid.io.opening import open_checkpoint
from mergeid.methods.settings import Condition


def network(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"big.weight": (700, 100), "fc.weight": (5, 7), "scale": ()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} | {"steps": torch.tensor(3)}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate("abc"):
        save_file(network(seed), tmp_path / f"{name}.safetensors")
    return [tmp_path / f"{name}.safetensors" for name in "abc"]


def merge(paths: list[Path], output: Path, **options: object) -> dict[str, torch.Tensor]:
    more = [open_checkpoint(p) for p in paths[2:]]
    merge_checkpoints(*paths[:2], output, more=more, force=True, **options)  # type: ignore[arg-type]
    return load_file(output)


def test_numpy_and_torch_agree_to_the_last_bit(three: list[Path], tmp_path: Path) -> None:
    weights = [(Condition(w, "fc.*"), Condition(v)) for w, v in ((0.1, 0.2), (0.1, 0.5), (0.8, 0.3))]
    found = [merge(three, tmp_path / f"{k}.safetensors", weights=weights, **how) for k, how in enumerate(
        ({}, {"transform_b": lambda n, t: t})
    )]  # fmt: skip
    for name in found[0]:
        assert bytes(tensor_bytes(found[0][name])) == bytes(tensor_bytes(found[1][name])), name
    a, b, c = (load_file(p)["fc.weight"].double() for p in three)
    torch.testing.assert_close(found[0]["fc.weight"], (0.1 * a + 0.1 * b + 0.8 * c).float())


def test_the_widest_format_wins(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.bfloat16), ("b", torch.bfloat16), ("c", torch.float16)):
        save_file(network(ord(name), dtype), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in "abc"]
    with pytest.warns(MergeidWarning, match="BF16 in .*a.safetensors, F16 in .*c.safetensors"):
        found = merge(paths, tmp_path / "o.safetensors")
    assert found["fc.weight"].dtype == torch.float32
    assert set(plan_many([open_checkpoint(p) for p in paths], dtype="float16").dtypes.values()) == {"F16"}
    assert plan_many([open_checkpoint(p) for p in paths[:2]], base=open_checkpoint(paths[2])).dtypes == {}


def test_what_differs_and_what_is_skipped(three: list[Path], tmp_path: Path) -> None:
    c = load_file(three[2])
    save_file({**c, "steps": torch.tensor(4), "extra": torch.ones(2)}, three[2])
    with pytest.raises(MergeidError, match=r"tensor 'extra' is only in .*c.safetensors"):
        merge(three, tmp_path / "o.safetensors")
    report = merge_checkpoints(
        *three[:2], tmp_path / "o.safetensors", more=[open_checkpoint(three[2])], skip=["extra", "fc.*"]
    )
    assert report.taken_from_a == ("steps",) and report.left_out == ("extra",) and report.skipped == ("fc.weight",)
    with pytest.raises(MergeidError, match=r"--skip 'none' matches no tensor of .*a.safetensors or .*c.safetensors"):
        merge(three, tmp_path / "o.safetensors", skip=["none"])


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock", "karcher", "dare_linear"])
@pytest.mark.parametrize("where", ["c", "base"])
def test_nan_is_found_in_every_model(three: list[Path], tmp_path: Path, method: str, where: str) -> None:
    based = method not in ("linear", "karcher")
    save_file(network(9), tmp_path / "base.safetensors")
    broken = tmp_path / f"{where}.safetensors"
    tensors = load_file(broken)
    tensors["big.weight"][600, 3] = math.nan
    save_file(tensors, broken)
    base = tmp_path / "base.safetensors" if based else None
    if where == "base" and not based:
        merge(three, tmp_path / "o.safetensors", method=method)
        return
    with pytest.raises(MergeidError, match=rf"tensor 'big.weight' of .*{where}.safetensors holds NaN"):
        merge(three, tmp_path / "o.safetensors", method=method, base=base)
    assert not (tmp_path / "o.safetensors").exists()


def test_two_of_three_are_one_file(three: list[Path], tmp_path: Path) -> None:
    with pytest.warns(MergeidWarning, match="two of the models are the same file .*; it counts twice"):
        merge([three[0], three[1], three[0]], tmp_path / "o.safetensors")


def test_the_command_plans_measures_and_repairs(tmp_path: Path) -> None:
    import timm

    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        state = timm.create_model("test_vit", num_classes=4, in_chans=1, img_size=32).state_dict()
        generator = torch.Generator().manual_seed(seed)
        noisy = {k: v + 0.02 * (seed > 0) * torch.randn(v.shape, generator=generator) for k, v in state.items()}
        save_file(noisy, tmp_path / f"{name}.safetensors")
    images = np.random.default_rng(0).standard_normal((20, 1, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images)
    told = ("--method", "ties", "--base", "base.safetensors", "--density", "0.5", "--repair", "repair")
    done = mergeid("merge", "a.safetensors", "b.safetensors", "--data", "data.npz", *told, cwd=tmp_path, columns=200)
    assert done.code == 0, done.stderr
    assert "b.safetensors: Verdict: merge directly" in done.stdout
    assert "base.safetensors: Verdict: merge directly" in done.stdout
    assert re.search(
        r"REPAIR: pre-activations of \d+ layers were rescaled on 20 examples; they had .*, now 1.00", done.stdout
    )
    record = json.loads((tmp_path / "mergeid.json").read_text())
    assert record["repair"]["kind"] == "repair" and len(record["further_plans"]) == 1
    assert record["overridden"] and record["method"] == "ties"
