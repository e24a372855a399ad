"""(IA)³ adapters on their base: the weights that PEFT itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.io.opening import open_checkpoint

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = transformers.BertConfig(**SMALL, intermediate_size=24)
GPT2 = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "biases": (
        "BertForMaskedLM",
        BERT,
        {"target_modules": ["query", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
    ),
    "stored [in, out]": (
        "GPT2LMHeadModel",
        GPT2,
        {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
    ),
}


def adapters(folder: Path, kind: str) -> Any:
    """The class; a base and two adapters in `folder`."""
    name, config, told = KINDS[kind]
    torch.manual_seed(0)
    base = getattr(transformers, name)(config)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    base.save_pretrained(folder / "base")
    for which in ("one", "two"):
        tuned = get_peft_model(getattr(transformers, name).from_pretrained(folder / "base"), IA3Config(**told))
        for key, parameter in tuned.named_parameters():
            if "ia3_" in key:
                parameter.data += 0.5 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / which)
    return getattr(transformers, name)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_makes_the_same_weights(tmp_path: Path, kind: str) -> None:
    """Of one adapter, and of a weighted sum of two."""
    base = adapters(tmp_path, kind)
    mergeid.merge(tmp_path / "one", tmp_path / "two", weights=[0.7, 0.3], match="never", output=tmp_path / "both")
    origin = open_checkpoint(tmp_path / "base")
    for name, ours in (("one", open_checkpoint(tmp_path / "one")), ("both", open_checkpoint(tmp_path / "both"))):
        under = base.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(under, tmp_path / "one", adapter_name="one")
        loaded.load_adapter(tmp_path / "two", adapter_name="two")
        loaded.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both")
        loaded.set_adapter(name)
        theirs = loaded.merge_and_unload().state_dict()
        moved = 0
        for key in ours.table:
            torch.testing.assert_close(ours.tensor(key), theirs[key], rtol=1e-5, atol=1e-6)
            moved += not torch.equal(theirs[key], origin.tensor(key))
        assert moved >= 3


@pytest.mark.filterwarnings("ignore:.*was trained on")
def test_a_vector_of_another_size(tmp_path: Path) -> None:
    adapters(tmp_path, "biases")
    transformers.BertForMaskedLM(
        transformers.BertConfig(**{**SMALL, "hidden_size": 32}, intermediate_size=24)
    ).save_pretrained(tmp_path / "wide")
    with pytest.raises(MergeidError, match=r"ia3_l \[.*\] does not fit .* of .*wide; expected the base"):
        open_checkpoint(f"{tmp_path / 'wide'}+{tmp_path / 'one'}")


class Convolutions(nn.Module):
    """As many inputs as outputs, more and fewer, in groups, with kernels of two and of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.wider = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 12, 1, bias=False)
        self.grouped, self.depthwise = nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 12, 3, groups=6)
        self.volume, self.head = nn.Conv3d(12, 4, 2), nn.Linear(4, 3)


LAYERS = ["square", "wider", "grouped", "depthwise", "volume", "head"]


@pytest.mark.parametrize("inputs", [[], *([name] for name in LAYERS), LAYERS, "(squ|dep|gro).*"], ids=str)
def test_convolutions_too(tmp_path: Path, inputs: Any) -> None:
    """They were refused, as vectors of another size."""
    torch.manual_seed(0)
    base = Convolutions()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    tuned = get_peft_model(base, IA3Config(target_modules=LAYERS, feedforward_modules=inputs))
    for key, parameter in tuned.named_parameters():
        if "ia3_" in key:
            parameter.data += 0.5 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "one")
    ours = open_checkpoint(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'one'}")
    theirs = tuned.merge_and_unload().state_dict()
    assert set(ours.table) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours.tensor(key), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("told", ["(", 3, [1], {"a": 1}])
def test_feedforward_modules_that_are_none(tmp_path: Path, told: Any) -> None:
    adapters(tmp_path, "biases")
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "feedforward_modules": told}))
    with pytest.raises(MergeidError, match=r"adapter_config.json: feedforward_modules .*expected names of modules"):
        open_checkpoint(tmp_path / "one")
