"""Experts in one tensor in one file, and one by one in another, against averages of the loaded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergeid

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    ),
}
WEIGHTS = "model.safetensors"


def written(out: Path, kind: str, seed: int, fused: bool) -> dict[str, torch.Tensor]:
    """A small mixture of experts as transformers 4 (one by one) or as its module of transformers 5 holds them."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.save_pretrained(out)
    if fused:
        save_file({n: w.clone() for n, w in model.state_dict().items()}, out / WEIGHTS, metadata={"format": "pt"})
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("first", ["apart", "fused"])
def test_experts_fused_or_apart(tmp_path: Path, kind: str, first: str) -> None:
    a, b, out = (tmp_path / n for n in ("a", "b", "out"))
    one, two = written(a, kind, 0, first == "fused"), written(b, kind, 1, first == "apart")
    assert load_file(a / WEIGHTS).keys() != load_file(b / WEIGHTS).keys()
    result = mergeid.merge(a, b, output=out, match="never", weights=[0.25, 0.75])
    how = "one by one" if first == "apart" else "in one tensor"
    assert any(f"the experts of {b} are read {how}, as {a} has them" in note for note in result.notes)
    assert load_file(out / WEIGHTS).keys() == load_file(a / WEIGHTS).keys()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * two[name])
