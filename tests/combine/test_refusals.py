"""Sentences for numbers that cannot be merged name the tensor, its file, what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergeid
from mergeid.combine.refusals import not_finite, overflows
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint


@pytest.mark.parametrize(("nan", "what"), [(True, "NaN"), (False, "an infinite number")])
def test_a_number_that_is_none_is_named_with_its_file(nan: bool, what: str) -> None:
    source = Checkpoint.from_tensors({"layer.w": torch.ones(2)}, path=Path("somewhere/a.safetensors"))
    said = not_finite("layer.w", source, nan=nan)
    assert said.startswith(f"tensor 'layer.w' of somewhere/a.safetensors holds {what};")
    assert "finite weights" in said and "--skip 'layer.w'" in said


def test_an_overflow_is_named_with_its_format_and_weights() -> None:
    said = overflows("layer.w", "F16", [0.5, 2.0])
    assert said.startswith("tensor 'layer.w' overflows F16 when merged with weights 0.5, 2;")
    assert "--dtype float32" in said


def test_a_merge_that_overflows_is_refused_by_name_with_its_weights(tmp_path: Path) -> None:
    """By torch: task arithmetic adds up 3 times 30,000."""
    base, tuned = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 30_000.0, 2.0])}
    for name, state in (("base", base), ("a", tuned), ("b", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(MergeidError, match=r"'w' overflows F16 when merged with weights 1\.5, 1\.5"):
        mergeid.merge(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            base=tmp_path / "base.safetensors",
            method="task_arithmetic",
            weights=[1.5, 1.5],
            match="never",
            dtype="float16",
            output=tmp_path / "o.safetensors",
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_a_report_says_where_the_output_lies(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "o.safetensors"
    made = mergeid.merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", match="never", output=out)
    assert made.report["output"] == str(out) and str(out) in made.report["files"]
