"""PEFT adapters laid on their base, against PEFT itself."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import mergeid
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.lora_forming import LoraConfig as ReadConfig
from mergeid.io.lora_forming import shared_base
from mergeid.io.opening import open_checkpoint
from mergeid.verbs.extract import _pattern

PLAIN = {"match": "never", "force": True}


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def adapter(base: Path, out: Path, seed: int, **told: Any) -> Path:
    """A random adapter on the model in that folder, written by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **told}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        biases = told.get("bias", "none") != "none" and "bias" in name and parameter.requires_grad
        if "lora_" in name or "modules_to_save" in name or biases:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(out, save_embedding_layers=bool(told.get("modules_to_save")))  # all of its odd names
    return out


def by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("bases")
    llama().save_pretrained(work / "llama")
    gpt2().save_pretrained(work / "gpt2")
    return work


ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "ranks and alphas": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"v_proj": 9, "^model.layers.0.self_attn.q_proj": 3},
        },
    ),
    "modules to save": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "all at once": (
        "llama",
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "use_rslora": True,
            "use_dora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 5},
            "modules_to_save": ["norm"],
        },
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "biases of its modules": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_its_base_is_what_peft_makes_of_it(bases: Path, tmp_path: Path, kind: str) -> None:
    name, told = KINDS[kind]
    base, folder = bases / name, adapter(bases / name, tmp_path / "l", 1, **told)
    expected = by_peft(base, folder)
    for source in (f"{base}+{folder}", str(folder)):
        found = open_checkpoint(source)
        assert set(found.table) == set(open_checkpoint(base).table)
        changed = 0
        for key in found.table:
            torch.testing.assert_close(found.tensor(key), expected[key], rtol=1e-5, atol=1e-6)
            changed += not torch.equal(found.tensor(key), open_checkpoint(base).tensor(key))
        assert changed >= 2
    assert shared_base([open_checkpoint(str(folder)), open_checkpoint(base)]) is not None
    assert shared_base([open_checkpoint(base), open_checkpoint(base)]) is None


def test_convolutions(tmp_path: Path) -> None:
    """Factors of kernels: one convolution into few channels, and one of 1 x 1 out of them."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    base, folder = tmp_path / "base", tmp_path / "l"
    transformers.ResNetModel(config).save_pretrained(base)
    told = LoraConfig(r=3, lora_alpha=5, target_modules=["convolution"], rank_pattern={"layer.1.convolution": 2})
    model = get_peft_model(transformers.ResNetModel.from_pretrained(base), told)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    plain = transformers.ResNetModel.from_pretrained(base)
    expected = PeftModel.from_pretrained(copy.deepcopy(plain), folder).merge_and_unload().state_dict()
    found = open_checkpoint(f"{base}+{folder}")
    changed = [n for n in found.table if not torch.equal(found.tensor(n), plain.state_dict()[n])]
    assert len(changed) >= 4 and {len(found.table[n].shape) for n in changed} == {4}
    for name in found.table:
        torch.testing.assert_close(found.tensor(name), expected[name], rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "began with parts taken out of its base .init_lora_weights 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    "bias of a factor": ({"lora_bias": True}, "has lora_bias"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "has trainable_token_indices"),
    "parameters": ({"target_parameters": ["down_proj.weight"]}, "has target_parameters"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "has alora_invocation_tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_more_than_an_update_are_refused(bases: Path, tmp_path: Path, kind: str) -> None:
    told, match = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, that such an adapter cannot be merged
        folder = adapter(bases / "llama", tmp_path / "l", 1, target_modules=["q_proj"], **told)
    with pytest.raises(MergeidError, match=rf"{match}.*; merge the adapter with PEFT first"):
        open_checkpoint(f"{bases / 'llama'}+{folder}")


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.tensor([[1, 7, 3, 40]])


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    )


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=2))


def tied(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return gpt2()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))


def trained(base: torch.nn.Module, folder: Path, **told: Any) -> Path:
    """Saves a base and a random adapter of PEFT on it; the folder of the adapter."""
    base.save_pretrained(folder / "base")
    model = get_peft_model(type(base).from_pretrained(folder / "base"), LoraConfig(r=4, **told))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves embeddings
        model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def same_function(kind: Any, folder: Path, x: torch.Tensor) -> None:
    """The written merge of BASE+ADAPTER with itself computes what PEFT's model does, as it was trained."""
    both = f"{folder / 'base'}+{folder / 'adapter'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mergeid.merge(both, both, output=folder / "out", **PLAIN)
        expected = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "adapter").eval()
    with torch.no_grad():
        found = kind.from_pretrained(folder / "out").eval()(x).logits
        torch.testing.assert_close(found, expected(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "saved"), [(vit, "classifier"), (mixtral, "gate")])
def test_files_may_have_other_names_than_the_network(tmp_path: Path, build: Any, saved: str) -> None:
    """PEFT names modules of the network; transformers writes some of them under older names."""
    model = build()
    trained(model, tmp_path, target_modules=ATTENTION, modules_to_save=[saved])
    same_function(type(model), tmp_path, torch.randn(1, 3, 16, 16) if build is vit else TOKENS)


def test_experts_that_the_library_stacks_are_refused(tmp_path: Path) -> None:
    folder = trained(mixtral(), tmp_path, target_modules=ATTENTION, modules_to_save=["experts"])
    with pytest.raises(MergeidError, match=r"changes '.*experts\..*', into which experts are stacked that"):
        open_checkpoint(f"{tmp_path / 'base'}+{folder}")


TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "embedding factored": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head factored": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "both saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "both stay one": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "another library name": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True},
    ),
    "neither": ("llama", {"target_modules": ["q_proj"]}),
}


@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*tied")  # PEFT's
@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_that_changes_one_of_two_tied_tensors(tmp_path: Path, kind: str) -> None:
    name, told = TIED[kind]
    model = tied(name)
    trained(model, tmp_path, **told)
    same_function(type(model), tmp_path, TOKENS)
    stays = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", True)
    assert stays == (kind in ("both stay one", "neither"))


@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*tied")  # PEFT's
def test_one_of_several_tied_embeddings_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    folder = trained(model, tmp_path, target_modules=["q"], modules_to_save=["encoder.embed_tokens"])
    with pytest.raises(MergeidError, match=r"changes 'encoder.embed_tokens.weight' and not .*, which are one in"):
        open_checkpoint(f"{tmp_path / 'base'}+{folder}")


def test_factors_in_float8_are_those_numbers(bases: Path, tmp_path: Path) -> None:
    eight = {name: (value / 3).to(torch.float8_e4m3fn) for name, value in SOUND.items()}
    for name, tensors in (("eight", eight), ("wide", {n: v.float() for n, v in eight.items()})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    one, two = (open_checkpoint(f"{bases / 'llama'}+{tmp_path / name}") for name in ("eight", "wide"))
    for name in one.table:
        assert torch.equal(one.tensor(name), two.tensor(name))


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
A, B, MAGNITUDE = (f"{QUERY}.lora_{end}" for end in ("A.weight", "B.weight", "magnitude_vector"))
SOUND = {A: torch.ones(2, 16), B: torch.ones(16, 2)}


@pytest.mark.parametrize(
    ("tensors", "told", "message"),
    [
        ({}, {"alpha_pattern": {"(": 3}}, r"adapter_config.json: alpha_pattern '\(' is no pattern"),
        ({A: torch.ones(0, 16), B: torch.ones(16, 0)}, {}, r"lora_A.weight \[0, 16\] does not fit"),
        ({A: torch.ones(()), B: torch.ones(())}, {}, r"lora_A.weight \[\] does not fit"),
        ({A: torch.ones(16), B: torch.ones(16)}, {}, r"lora_A.weight \[16\] does not fit"),
        ({MAGNITUDE: torch.ones(7)}, {"use_dora": True}, r"magnitude_vector \[7\] does not fit"),
        ({A: torch.full((2, 16), torch.nan)}, {}, "adapter_model.safetensors: .*lora_A.weight holds NaN"),
        ({B: torch.full((16, 2), torch.inf)}, {}, "adapter_model.safetensors: .*lora_B.weight holds an infinite"),
        ({"base_model.model.model.norm.weight": torch.full((16,), torch.nan)}, {}, "model.norm.weight holds NaN"),
        (
            {A.removeprefix("base_model.model."): torch.zeros(2, 16)},
            {},
            "holds one tensor twice, as .*lora_A.weight and",
        ),
        (
            {n.replace("model.model.layers", "model.layers"): torch.ones(s) for n, s in ((A, (2, 16)), (B, (16, 2)))},
            {},
            "two updates of model.layers.0.self_attn.q_proj.weight, under layers.*q_proj and model.*q_proj",
        ),
        (
            {f"{begin}model.norm.weight": torch.full((16,), 1.0 + len(begin)) for begin in ("", "base_model.model.")},
            {},
            "holds one tensor twice, as .*model.norm.weight and",
        ),
        ({}, {"lora_alpha": 1e39}, r"is not finite with .*adapter_model.safetensors on it \(B A times 5e\+38\)"),
    ],
)
def test_damaged_adapters_are_refused(
    bases: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], told: dict[str, Any], message: str
) -> None:
    (tmp_path / "adapter").mkdir()
    save_file({**SOUND, **tensors}, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **told}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MergeidError, match=message):
        mergeid.merge(f"{bases / 'llama'}+{tmp_path / 'adapter'}", bases / "llama", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_as_products(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rsLoRA, unequal ranks and DoRA: the merge of the full models, and of an adapter with its base."""
    base = bases / "llama"
    one = adapter(base, tmp_path / "one", 1, target_modules=ATTENTION, use_rslora=True)
    two = adapter(base, tmp_path / "two", 2, target_modules=["q_proj", "down_proj"], r=2, use_dora=True)
    full = [by_peft(base, f) for f in (one, two)]
    origin = open_checkpoint(base)
    done = mergeid.merge(str(one), f"{base}+{two}", weights=[0.3, 0.7], output=tmp_path / "out")
    assert "share its neurons" in " ".join(done.notes)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    half = mergeid.merge(str(base), str(one), output=tmp_path / "half", **PLAIN)
    assert half.verdict == "direct" and (tmp_path / "half" / "config.json").is_file()
    halves = load_file(tmp_path / "half" / "model.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(value, 0.3 * full[0][key] + 0.7 * full[1][key], rtol=1e-6, atol=1e-6)
        wanted = (origin.tensor(key) + full[0][key]) / 2
        torch.testing.assert_close(halves[key], wanted, rtol=1e-6, atol=1e-6)
    mergeid.merge(str(one), str(two), base=str(base), method="ties", density=0.5, output=tmp_path / "ties", **PLAIN)
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ties")


def test_two_adapters_of_one_file_are_two_models(bases: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """One file of factors under two alphas; the same adapter twice is said."""
    one = adapter(bases / "llama", tmp_path / "one", 1, target_modules=ATTENTION)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "adapter_model.safetensors").symlink_to(one / "adapter_model.safetensors")
    told = json.loads((one / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps({**told, "lora_alpha": 3}))
    mergeid.merge(str(one), str(tmp_path / "two"), output=tmp_path / "m", match="never")
    assert not [w for w in recwarn if "same file" in str(w.message)]
    merged, full = load_file(tmp_path / "m" / "model.safetensors"), by_peft(bases / "llama", one)
    half = by_peft(bases / "llama", tmp_path / "two")
    for key, value in merged.items():
        torch.testing.assert_close(value, (full[key] + half[key]) / 2, rtol=1e-6, atol=1e-6)
    with pytest.warns(match="both models are the same file"):
        mergeid.merge(str(one), str(one), output=tmp_path / "n", match="never")


def test_an_adapter_and_a_full_model_are_planned(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(bases / "llama", tmp_path / "l", 1, target_modules=ATTENTION)
    mergeid.scramble(bases / "llama", output=tmp_path / "s", seed=3)
    done = mergeid.merge(str(tmp_path / "s"), str(folder), output=tmp_path / "out")
    assert done.verdict == "match"
    # BASE+ADAPTER without a slash was taken for the name of an architecture
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases / "llama", "base")
    assert mergeid.graph("base+l").spaces


@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*tied")  # PEFT's, about modules that it unties
@pytest.mark.parametrize("kind", ["full rank", "truncated"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_extract(bases: Path, tmp_path: Path, kind: str, name: str) -> None:
    """What is extracted gives the fine-tune again, up to what the rank leaves out, which is what the SVD says."""
    base = bases / name
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    rank = 64 if kind == "full rank" else 3
    done = mergeid.extract(tmp_path / "tuned", base=base, output=tmp_path / "l", rank=rank)
    again = by_peft(base, tmp_path / "l")
    tuned, origin = open_checkpoint(tmp_path / "tuned"), open_checkpoint(base)
    lost = size = 0.0
    for key in tuned.table:
        if key in done.errors:
            delta = tuned.tensor(key).double() - origin.tensor(key).double()
            values = torch.linalg.svdvals(delta)
            missed = float((tuned.tensor(key).double() - again[key].double()).norm())
            assert missed == pytest.approx(float(values[rank:].square().sum()) ** 0.5, abs=1e-4)
            lost, size = lost + missed**2, size + float(delta.square().sum())
        else:
            torch.testing.assert_close(again[key], tuned.tensor(key))
    tokens = torch.tensor([[1, 7, 3]])
    if kind == "full rank":
        loaded = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "l")
        torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert done.error == pytest.approx((lost / size) ** 0.5, abs=1e-4)
    ours = open_checkpoint(str(tmp_path / "l"))
    for key in ours.table:
        torch.testing.assert_close(ours.tensor(key), again[key], rtol=1e-5, atol=1e-6)


def test_a_rank_of_its_own_is_for_its_module_alone() -> None:
    """By PEFT's own rule: a pattern stands for every module whose name ends with it after a dot."""
    ranks = {"fc": 2, "block.fc": 4, "block.other": 3}
    patterns = {_pattern(m, ranks): r for m, r in ranks.items() if r != 4}
    for module, rank in ranks.items():
        assert patterns.get(get_pattern_key(list(patterns), module), 4) == rank
        alphas = {k: float(v) for k, v in patterns.items()}
        assert ReadConfig(4.0, alphas).scaling(module, 1) == rank


def test_what_is_refused(bases: Path, tmp_path: Path) -> None:
    base = bases / "llama"
    folder = adapter(base, tmp_path / "l", 1, target_modules=ATTENTION)

    def refused(match: str, source: str, **told: Any) -> None:
        config = {**json.loads((folder / "adapter_config.json").read_text()), **told}
        shutil.copytree(folder, tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(MergeidError, match=match):
            open_checkpoint(source)

    bad = str(tmp_path / "bad")
    refused("is a PEFT adapter .LoRA. and has the base nowhere, which is not on this machine; name both as BASE.", bad,
            base_model_name_or_path="nowhere")  # fmt: skip
    refused("of type 'LOHA'; expected LORA or IA3", bad, peft_type="LOHA")
    refused("lora_alpha is 'much'", bad, lora_alpha="much")
    refused("has layer_replication, which is more", f"{base}+{bad}", layer_replication=[[0, 2]])
    with pytest.warns(MergeidWarning, match="was trained on .*llama, and is laid on .*gpt2 as requested"):
        refused(
            "changes 'model.layers.0.self_attn.q_proj.weight', and .*gpt2 has no such tensor", f"{bases / 'gpt2'}+{bad}"
        )
    refused("is not a PEFT adapter; expected a folder with adapter_config.json", f"{bad}+{base}")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(n for n in tensors if n.endswith("lora_A.weight"))
    save_file(
        {n: t[:, :7].contiguous() if n == first else t for n, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    refused(r"lora_A.weight \[4, 7\] does not fit model.layers.0.self_attn.q_proj.weight \[16, 16\]", f"{base}+{bad}")
    save_file({n: t for n, t in tensors.items() if n != first}, folder / "adapter_model.safetensors")
    refused("has only one of its two factors", f"{base}+{bad}")
    with pytest.raises(MergeidError, match="hold the same weights; there is nothing to extract"):
        mergeid.extract(base, base=base, output=tmp_path / "none")
    with pytest.raises(MergeidError, match="--rank is 0"):
        mergeid.extract(base, base=base, output=tmp_path / "none", rank=0)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_beside_the_config_of_its_base(bases: Path, tmp_path: Path, alone: bool) -> None:
    """Trainers leave ``config.json`` in an adapter's folder, which was then called no adapter. With a whole model's
    weights beside it, the folder is that model."""
    base = bases / "llama"
    folder = adapter(base, tmp_path / "l", 1, target_modules=ATTENTION)
    shutil.copy(base / "config.json", folder)
    torch.save({"step": 3}, folder / "optimizer.pt")
    found = open_checkpoint(str(folder) if alone else f"{base}+{folder}")
    expected = by_peft(base, folder)
    assert all(torch.allclose(found.tensor(n), expected[n], atol=1e-6) for n in found.table)
    shutil.copy(base / "model.safetensors", folder)
    found, whole = open_checkpoint(str(folder) if alone else f"{base}+{folder}"), load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found.tensor(name), whole[name]) is alone


def test_an_adapter_in_a_pickle(bases: Path, tmp_path: Path) -> None:
    """As PEFT wrote them: refused with the option that reads them; that option did not."""
    folder = adapter(bases / "llama", tmp_path / "l", 1, target_modules=ATTENTION)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    expected = by_peft(bases / "llama", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeidError, match=r"adapter_model.bin is a pickle .* --allow-pickle"):
        open_checkpoint(str(folder))
    found = open_checkpoint(str(folder), allow_pickle=True)
    assert all(torch.allclose(found.tensor(n), expected[n], atol=1e-6) for n in found.table)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(MergeidError, match=r"no adapter_model.safetensors; expected the adapter's weights"):
        open_checkpoint(str(folder))


def test_merge_of_adapters_is_written_as_an_adapter(bases: Path, tmp_path: Path) -> None:
    """Of full rank it is the merge itself in PEFT; of less it says what is left out, as the SVD has it."""
    base = bases / "llama"
    one, two = (adapter(base, tmp_path / f"l{i}", i, target_modules=ATTENTION) for i in (1, 2))
    mergeid.merge(str(one), str(two), output=tmp_path / "whole")
    result = mergeid.merge(str(one), str(two), output=tmp_path / "out", as_adapter=8)
    assert (tmp_path / "out" / "adapter_config.json").is_file() and "rank 8" in result.notes[-1]
    again, whole = by_peft(base, tmp_path / "out"), open_checkpoint(tmp_path / "whole")
    for key in whole.table:
        torch.testing.assert_close(again[key], whole.tensor(key), rtol=1e-5, atol=1e-6)
    low = mergeid.merge(str(one), str(two), output=tmp_path / "low", as_adapter=2)
    assert "leaves out 0 %" not in low.notes[-1]
    cut, origin = by_peft(base, tmp_path / "low"), open_checkpoint(base)
    for key in origin.table:
        delta, left = whole.tensor(key).double() - origin.tensor(key), whole.tensor(key).double() - cut[key]
        least = torch.linalg.svdvals(delta)[2:] if delta.dim() == 2 else torch.zeros(1)
        assert left.norm().item() == pytest.approx(least.norm().item(), abs=1e-5), key
    with pytest.raises(MergeidError, match="give --base"):
        mergeid.merge(tmp_path / "whole", base, output=tmp_path / "x", as_adapter=2)


def test_an_adapter_is_fetched_from_the_hub(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that exists wins, and what looks like no hub id is not asked for."""
    place, asked = adapter(bases / "llama", tmp_path / "cached", 1, target_modules=ATTENTION), []

    def download(source: str, **told: Any) -> Path:
        asked.append(source)
        return place

    monkeypatch.setattr("mergeid.io.hub.download", download)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases / "llama", tmp_path / "base")
    found, expected = open_checkpoint("base+org/adapter@v2"), by_peft(bases / "llama", place)
    assert asked == ["org/adapter@v2"] and found.source == "base+org/adapter@v2"
    name = "model.layers.1.self_attn.v_proj.weight"
    torch.testing.assert_close(found.tensor(name), expected[name])
    shutil.copytree(place, tmp_path / "org" / "adapter")
    open_checkpoint("base+org/adapter")
    with pytest.raises(MergeidError, match="no such file or folder"):
        open_checkpoint("base+none")
    assert len(asked) == 1
