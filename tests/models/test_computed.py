"""Weights that transformers computes and leaves out of its files: Marian's sinusoidal positions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergeid
from mergeid.errors import MergeidError
from mergeid.models.computed import fill_computed

SIZES = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 39, "decoder_start_token_id": 39, "eos_token_id": 0,
}  # fmt: skip


def marian(folder: Path) -> Path:
    """As the library saves it: without its tables."""
    torch.manual_seed(0)
    model = transformers.MarianMTModel(transformers.MarianConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    assert not [n for n in load_file(folder / "model.safetensors") if "embed_positions" in n]
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = transformers.MarianMTModel.from_pretrained(folder).eval()
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
    return answer


def test_copies_in_another_order_are_merged_without_the_tables(tmp_path):
    a, b = marian(tmp_path / "a"), tmp_path / "b"
    mergeid.scramble(a, output=b, seed=3)
    plain, moved = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert any(not torch.equal(plain[n], moved[n]) for n in plain)
    torch.testing.assert_close(logits(b), logits(a))
    mergeid.merge(a, b, output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == plain.keys()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(a))


def test_no_neuron_moves_in_a_table_that_no_file_holds(tmp_path):
    """The tables tie the residual streams down: their neurons could be moved in the file, and not in the table."""
    a = marian(tmp_path / "a")
    spaces = mergeid.graph(a).spaces
    assert not [s for s in spaces if any("embed_positions" in str(x) or "layer_norm" in str(x) for x in s.axes)]


def test_one_that_holds_the_tables_orders_none_that_lacks_them(tmp_path):
    """Its neurons could move in its own tables; the other would come out as another function."""
    a = marian(tmp_path / "a")
    shutil.copytree(a, whole := tmp_path / "whole")
    tensors = load_file(a / "model.safetensors")
    tables = {n: t for n, t in transformers.MarianMTModel.from_pretrained(a).state_dict().items() if "embed_pos" in n}
    save_file({**tensors, **{n: t.clone() for n, t in tables.items()}}, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeidError, match="leaves out 'model"):
        mergeid.align(a, to=whole, output=tmp_path / "x", skip=list(tables), match="always")
    mergeid.align(whole, to=a, output=tmp_path / "y", skip=list(tables), match="always")
    torch.testing.assert_close(logits(tmp_path / "y"), logits(a))


def test_a_weight_that_nobody_computes_is_missing(tmp_path):
    a = marian(tmp_path / "a")
    tensors = load_file(a / "model.safetensors")
    del tensors["model.encoder.layers.0.fc1.weight"]
    save_file(tensors, a / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeidError, match="lacks 1 of"):
        mergeid.graph(a)


class Stating:
    """Says of every weight that it is computed."""

    name = "stating"

    def computed(self, model: torch.nn.Module, missing: list[str]) -> list[str]:
        return missing


@pytest.fixture
def built() -> Iterator[torch.nn.Module]:
    yield torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))


def test_what_comes_out_otherwise_the_second_time_stays_missing(built):
    keys = list(built.state_dict())

    def again() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))

    filled = fill_computed(built, Stating(), keys, again)  # type: ignore[arg-type]
    assert filled == {"1.weight", "1.bias"}
    assert set(built.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(built[1].weight, torch.ones(3))
