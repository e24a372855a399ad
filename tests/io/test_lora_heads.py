"""Adapters that hold whole what their base lacks: heads of other tasks, rows for added tokens, a tokenizer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import mergeid
from mergeid.errors import MergeidError
from mergeid.io.opening import open_checkpoint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 48}
TOKENS = torch.tensor([[1, 7, 3, 40]])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PLAIN = {"match": "never", "force": True}


def saved(kind: str, folder: Path, **more: Any) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8} if kind.startswith("ViT") else {"vocab_size": 48}
    config = getattr(transformers, kind[: kind.find("For") if "For" in kind else kind.find("Model")] + "Config")
    getattr(transformers, kind)(config(**SMALL, **sizes, **more)).save_pretrained(folder)


def trained(model: torch.nn.Module, folder: Path, **told: Any) -> torch.nn.Module:
    """An adapter of PEFT on a model, with random numbers; as it was trained."""
    found = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "query"], **told}))
    torch.manual_seed(1)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves embeddings
        found.save_pretrained(folder)
    return found.eval()


def same_function(kind: Any, folder: Path, expected: torch.nn.Module, x: torch.Tensor) -> None:
    """The written merge of an adapter with itself loads whole, and computes what the trained model does."""
    both = f"{folder / 'base'}+{folder / 'adapter'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that both are the same
        mergeid.merge(both, both, output=folder / "out", **PLAIN)
    found, told = kind.from_pretrained(folder / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert found.config.architectures == [kind.__name__]
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x)[0], expected(x)[0], rtol=1e-4, atol=1e-5)


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "decoder": ("LlamaForCausalLM", "LlamaForSequenceClassification", {"task_type": "SEQ_CLS"}),
    "encoder without a prefix": ("BertModel", "BertForTokenClassification", {"task_type": "TOKEN_CLS"}),
    "head of two layers": ("RobertaForMaskedLM", "RobertaForSequenceClassification", {"task_type": "SEQ_CLS"}),
    "task without a name": ("ViTModel", "ViTForImageClassification", {"modules_to_save": ["classifier"]}),
    "other classes": ("ViTForImageClassification", "ViTForImageClassification", {"modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", HEADS)
def test_an_adapter_with_the_head_of_a_task_on_a_base_without(tmp_path: Path, case: str) -> None:
    """It was refused: the base that it was trained on "has no such tensor"."""
    base, name, told = HEADS[case]
    saved(base, tmp_path / "base", pad_token_id=1)
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    expected = trained(model, tmp_path / "adapter", **told)
    same_function(kind, tmp_path, expected, IMAGES if base.startswith("ViT") else TOKENS)


def test_a_head_whose_rest_lies_nowhere_is_refused(tmp_path: Path) -> None:
    """A pooler that was drawn at random, and saved in neither."""
    saved("BertForMaskedLM", tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", task_type="SEQ_CLS")
    with pytest.raises(MergeidError, match=r"changes 'classifier\.(bias|weight)', and .* has no such tensor"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def tokenizer(folder: Path, more: list[str], template: str | None = None) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    found.add_special_tokens({"additional_special_tokens": more})
    found.chat_template = template
    found.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*tied")  # PEFT's
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("both", [True, False])
def test_an_adapter_with_rows_for_added_tokens(tmp_path: Path, tied: bool, both: bool) -> None:
    """It was refused, for its base has fewer rows; the result has the adapter's tokenizer."""
    if not (tied or both):
        return  # a head of its own keeps its rows
    saved("LlamaForCausalLM", tmp_path / "base", tie_word_embeddings=tied)
    tokenizer(tmp_path / "base", [])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(50)
    saves = ["embed_tokens", *(["lm_head"] if both else [])]
    expected = trained(model, tmp_path / "adapter", modules_to_save=saves)
    tokenizer(tmp_path / "adapter", ["<a>", "<b>"], "{{ messages }}")
    same_function(transformers.LlamaForCausalLM, tmp_path, expected, torch.tensor([[1, 49, 3, 48]]))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(found) == 50 and found.chat_template == "{{ messages }}"
    with pytest.raises(MergeidError, match="--tokenizer union"):
        mergeid.merge(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "base", output=tmp_path / "no", **PLAIN)


@pytest.mark.parametrize("same", [True, False])
def test_the_tokenizer_that_an_adapter_was_trained_with(tmp_path: Path, same: bool) -> None:
    """Its chat template and special tokens were left behind without a word."""
    saved("LlamaForCausalLM", tmp_path / "base")
    tokenizer(tmp_path / "base", [])
    trained(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    tokenizer(tmp_path / "adapter", [] if same else ["<pad>"], "{{ messages }}")
    models = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "base"
    if same:
        mergeid.merge(*models, output=tmp_path / "out", **PLAIN)
    else:
        with pytest.warns(mergeid.MergeidWarning, match="tokenizer with other tokens than .*base, whose tokenizer is"):
            mergeid.merge(*models, output=tmp_path / "out", **PLAIN)
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == ("{{ messages }}" if same else None)


@pytest.mark.filterwarnings("ignore:.*tie", "ignore:.*tied")  # PEFT's
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_a_bias_that_is_tied_by_the_same_word_as_the_head(tmp_path: Path, kind: str) -> None:
    """An adapter of the head alone unties it; the head's bias then lay in no file, and transformers took zeros."""
    saved(kind, tmp_path / "base")
    network = getattr(transformers, kind)
    model = network.from_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "base")
    expected = trained(model, tmp_path / "adapter", target_modules=["decoder"])
    same_function(network, tmp_path, expected, TOKENS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
