"""What a fine-tune adds to its base as an adapter: PEFT puts it on the base, and has the fine-tune again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.models.adapter_modules import Anatomy, _stored

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.tensor([[1, 7, 3, 39]])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[str, Any]] = {
    "Qwen2": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**TEXT)),
    "Bert": ("BertForSequenceClassification", lambda: transformers.BertConfig(**SMALL, vocab_size=40, num_labels=3)),
    "BertMaskedLM": ("BertForMaskedLM", lambda: transformers.BertConfig(**SMALL, vocab_size=40)),
    "Mixtral": ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**TEXT, num_local_experts=2)),
    "ViT": (
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3),
    ),
}


def tuned(name: str, work: Path, only: Callable[[str], bool] = lambda key: True) -> tuple[Any, nn.Module]:
    """The class, and a fine-tune of a base in `work`, both saved: of the parameters that are named."""
    kind, config = getattr(transformers, MODELS[name][0]), MODELS[name][1]()
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(work / "base")
    for key, parameter in model.named_parameters():
        if only(key):
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(work / "tuned")
    return kind, model


def extract(work: Path) -> None:
    mergeid.extract(work / "tuned", base=work / "base", output=work / "adapter", rank=64)


def with_adapter(base: nn.Module, work: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie|tied).*")  # nothing else: PEFT warns of what it does not find
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        return PeftModel.from_pretrained(base, work / "adapter").eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Qwen2", "Bert", "ViT"])
def test_peft_has_the_fine_tune_again(tmp_path: Path, name: str) -> None:
    kind, model = tuned(name, tmp_path)
    extract(tmp_path)
    x = IMAGES[:, :, :16, :16] if name == "ViT" else TOKENS
    found = with_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    both = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"  # and so has mergeid
    mergeid.merge(both, tmp_path / "tuned", output=tmp_path / "out", match="never")
    again = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)


def test_routers_are_held_and_stacked_experts_refused(tmp_path: Path) -> None:
    kind, model = tuned("Mixtral", tmp_path, lambda key: "experts" not in key)
    extract(tmp_path)
    found = with_adapter(kind.from_pretrained(tmp_path / "base"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    tuned("Mixtral", tmp_path)
    with pytest.raises(MergeidError, match=r"experts\.0\.w\d\.weight changed, and no .* stacked with others"):
        mergeid.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def saved_timm(name: str, model: nn.Module, folder: Path) -> None:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 4}))


def pair_of_timm(name: str, work: Path, **told: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base, model = (timm.create_model(name, num_classes=4, **told).eval() for _ in range(2))
    model.load_state_dict(base.state_dict())
    for tensor in model.state_dict().values():
        tensor += 0.05 * torch.rand_like(tensor) if tensor.is_floating_point() else 3
    saved_timm(name, base, work / "base")
    saved_timm(name, model, work / "tuned")
    return base, model


def test_statistics_and_counters_go_with_their_module(tmp_path: Path) -> None:
    """``bn1`` is also how the names of other modules end."""
    base, model = pair_of_timm("test_resnet", tmp_path)
    extract(tmp_path)
    found = with_adapter(base, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    assert "bn1" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "BertMaskedLM"])
def test_parameters_beside_factored_layers_are_refused(tmp_path: Path, name: str) -> None:
    if name == "BertMaskedLM":
        tuned(name, tmp_path)
    else:
        pair_of_timm(name, tmp_path)
    with pytest.raises(MergeidError, match=r"^[\w.]+ changed, and PEFT cannot save the module that holds it \(the "):
        extract(tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, where: str, value: float) -> None:
    tuned("Qwen2", tmp_path)
    file = tmp_path / where / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    what = "NaN" if value != value else "an infinite number"
    with pytest.raises(MergeidError, match=rf"up_proj.weight' of .*{where}.* holds {what}; [^-]*$"):
        extract(tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("part", ["bias", "norm"])
def test_nothing_to_factor_is_refused(tmp_path: Path, part: str) -> None:
    tuned("Qwen2", tmp_path, lambda key: part in key)
    with pytest.raises(MergeidError, match=rf"{part}.* and \d+ more changed .* no weight of a linear layer did"):
        extract(tmp_path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner["fc"](self.fc(self.attention(x, x, x)[0]))
        return found


@pytest.mark.parametrize("target", ["attention.out_proj", "fc"])
def test_a_layer_that_attention_does_not_call_is_not_factored(target: str) -> None:
    """PEFT's factors on it change nothing."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(1, 3, 8)
    before, factored = model(x), _stored(dict(model.named_modules()), f"{target}.weight") is not None
    told = LoraConfig(target_modules=[target], init_lora_weights=False)
    adapted = get_peft_model(model, told)  # type: ignore[arg-type]
    assert factored != torch.equal(adapted(x), before)


@pytest.mark.parametrize("factored", [{"fc"}, {"inner.fc"}, {"fc", "inner.fc"}])
def test_peft_finds_the_factored_modules_alone(factored: set[str]) -> None:
    modules = dict(Block().named_modules())
    told = LoraConfig(target_modules=Anatomy("", {}, (), {}, frozenset(), False, modules).targets(factored))
    assert {name for name in modules if check_target_module_exists(told, name)} == factored


def test_files_whose_architecture_is_named(tmp_path: Path) -> None:
    """Files alone say too little of a BERT; --arch was asked for, and there was no such option."""
    tuned("Bert", tmp_path)
    for name in ("base", "tuned"):
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / f"{name}.safetensors")
    config, files = str(tmp_path / "base" / "config.json"), [tmp_path / f"{n}.safetensors" for n in ("tuned", "base")]
    with pytest.raises(MergeidError, match="specify it with --arch"):
        mergeid.extract(files[0], base=files[1], output=tmp_path / "adapter", rank=4)
    mergeid.extract(files[0], base=files[1], output=tmp_path / "adapter", rank=4, arch=config)
    mergeid.merge(
        files[0], base=files[1], method="task_arithmetic", arch=config, output=tmp_path / "again", as_adapter=4
    )
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
