"""Sentences for numbers that cannot be merged name the tensor, its file, what is wrong and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeid.combine.refusals import not_finite, overflows
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
