"""The same network under other tensor names: read under the first model's, and said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergeid
from mergeid.errors import MergeidError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
WEIGHTS = "model.safetensors"


def save(kind: str, seed: int, out: Path, **told: object) -> Path:
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.BertConfig(**SIZES), **told)
    model.save_pretrained(out)
    return out


def merged(a: Path, b: Path, out: Path, **told: object) -> tuple[dict[str, torch.Tensor], str]:
    done = mergeid.merge(a, b, output=out, match="never", **told)
    return load_file(out / WEIGHTS if out.is_dir() else out), " ".join(done.notes)


def rename(folder: Path, change: dict[str, str]) -> None:
    """Rewrite a folder's tensors with parts of their names replaced ("": put before)."""
    tensors = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for old, new in change.items():
            name = new + name if old == "" else name.replace(old, new)
        tensors[name] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("encoder_first", [True, False])
def test_an_encoder_and_a_task_model(tmp_path: Path, encoder_first: bool) -> None:
    a = save("BertModel", 0, tmp_path / "a", add_pooling_layer=False)
    b = save("BertForMaskedLM", 1, tmp_path / "b")
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    first, second = (a, b) if encoder_first else (b, a)
    found, notes = merged(first, second, tmp_path / "out")
    assert "have different names in" in notes and "bert.embeddings" in notes
    assert set(found) == set(x if encoder_first else y)
    for name, value in found.items():
        bare = name.removeprefix("bert.")
        if bare in x:
            torch.testing.assert_close(value, (x[bare] + y[f"bert.{bare}"]) / 2)
        else:  # the head that one of them has
            assert torch.equal(value, y[name])
    assert ("left out" if encoder_first else "and kept") in notes


@pytest.mark.parametrize(
    "change",
    [
        {"": "module."},
        {"": "_orig_mod."},
        {"": "base_model.model."},
        {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
    ],
)
def test_wrappers_and_old_names(tmp_path: Path, change: dict[str, str]) -> None:
    a, b = (save("BertModel", seed, tmp_path / n, add_pooling_layer=False) for seed, n in enumerate("ab"))
    x, y = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    rename(b, change)
    found, notes = merged(a, b, tmp_path / "out")
    assert set(found) == set(x) and "have different names" in notes
    for name, value in found.items():
        torch.testing.assert_close(value, (x[name] + y[name]) / 2)
    assert mergeid.merge(a, b, output=tmp_path / "again", match="auto", force=True).files


def test_buffers_that_the_library_ignores(tmp_path: Path) -> None:
    a, b = (save("BertModel", seed, tmp_path / n, add_pooling_layer=False) for seed, n in enumerate("ab"))
    extra = {"embeddings.position_ids": torch.arange(32)[None]}
    save_file({**load_file(b / WEIGHTS), **extra}, b / WEIGHTS, metadata={"format": "pt"})
    for i, (first, second) in enumerate(((a, b), (b, a))):
        found, notes = merged(first, second, tmp_path / f"out{i}")
        assert "position_ids is only in" in notes and ("embeddings.position_ids" in found) == (first is b)


def test_a_prefix_of_a_network_that_no_library_has(tmp_path: Path) -> None:
    x = {f"layer{i}.weight": torch.randn(3, 3) for i in range(3)}
    y = {name: torch.randn(3, 3) for name in x}
    save_file(x, tmp_path / "a.safetensors")
    save_file({f"module.{n}": t for n, t in y.items()}, tmp_path / "b.safetensors")
    found, notes = merged(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out.safetensors")
    assert "module.layer0.weight" in notes
    for name, value in found.items():
        torch.testing.assert_close(value, (x[name] + y[name]) / 2)


def test_what_is_still_refused(tmp_path: Path) -> None:
    """A weight that one file lacks is no matter of names."""
    a, b = (save("BertModel", seed, tmp_path / n, add_pooling_layer=False) for seed, n in enumerate("ab"))
    tensors = load_file(b / WEIGHTS)
    name = "encoder.layer.1.output.dense.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, b / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MergeidError, match=f"{name}' is only in"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")


def test_layers_of_other_sizes_are_no_heads(tmp_path: Path) -> None:
    """The message was about task heads and tokens, and advised to skip the layers."""
    told = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for name, heads in (("a", 2), ("b", 4)):
        config = transformers.LlamaConfig(**told, num_attention_heads=4, num_key_value_heads=heads)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    with pytest.raises(MergeidError, match=r"k_proj.*; the models differ in num_key_value_heads \(2 and 4\)$"):
        merged(tmp_path / "a", tmp_path / "b", tmp_path / "out")
