"""The coverage bench over transformers' model types: the ones named in the issue, and a sample of all."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from test_adapter_shrink import NAMED

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import coverage_transformers as types
from coverage_check import check


@pytest.mark.parametrize("name", NAMED)
def test_named_types_hold(name):
    row = check(types.make(name))
    assert row["verified"] == row["held_again"] == 1 and row["failed"] == ""
    assert row["share"] > 0.95 and row["spaces"] > 2
    assert row["unknown_ops"] == ""


@pytest.mark.parametrize("name", [n for n in NAMED if n not in ("mamba", "mamba2", "deberta-v2", "swin")])
def test_written_out_attention_holds(name):
    row = check(types.make(name + types.EAGER))
    assert row["verified"] == row["held_again"] == 1
    assert row["share"] > 0.95


def test_every_type_has_a_row():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = types.names()
    assert len(set(names)) == len(names) and set(CONFIG_MAPPING_NAMES) <= set(names)
    assert set(types.families()) == set(names)
    assert "llama:eager" in names and "mamba:eager" not in names


def test_what_cannot_be_built_says_why():
    with pytest.raises(types.NotBuilt, match=r"^not built: its forward takes a video session object"):
        types.make("sam2_video")
    with pytest.raises(types.NotBuilt, match=r"^not built: no class of its own with a forward pass"):
        types.make("sam_prompt_encoder")  # made from the whole model's configuration


@pytest.mark.parametrize(
    ("name", "class_name"), [("sam2_mask_decoder", "Sam2MaskDecoder"), ("idefics_vision", "IdeficsVisionTransformer")]
)
def test_parts_that_are_plain_modules_hold(name, class_name):
    case = types.make(name)
    row = check(case)
    assert case.note == class_name
    assert row["verified"] == row["held_again"] == 1 and row["spaces"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", random.Random(1).sample(types.names(), 40))
@pytest.mark.filterwarnings("ignore")
def test_a_sample_holds(name):
    try:
        case = types.make(name)
    except types.NotBuilt:
        return
    row = check(case)
    assert row["verified"] == row["held_again"] == 1 and row["spaces"]
