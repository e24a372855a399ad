"""What a merge takes, told by headers that have no weights behind them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import mergeid
from mergeid.reporting.show_estimate import print_estimate
from mergeid.results.estimate import Estimate

SEVENTY = {"layers": 80, "width": 8192, "inner": 28672, "narrow": 1024, "words": 128_256}
EIGHT = {"layers": 32, "width": 4096, "inner": 14336, "narrow": 1024, "words": 128_256}


def llama(folder: Path, layers: int, width: int, inner: int, narrow: int, words: int) -> Path:
    """A Llama's header in one file, the weights a hole in it that takes no room on the disk."""
    shapes = {"model.embed_tokens.weight": [words, width], "lm_head.weight": [words, width]}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}self_attn.{n}_proj.weight": [m, width] for n, m in (("q", width), ("k", narrow), ("v", narrow))
        }
        shapes |= {f"{at}self_attn.o_proj.weight": [width, width], f"{at}mlp.down_proj.weight": [width, inner]}
        shapes |= {f"{at}mlp.{n}_proj.weight": [inner, width] for n in ("gate", "up")}
        shapes |= {f"{at}{n}_layernorm.weight": [width] for n in ("input", "post_attention")}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": words}))
    return folder


@pytest.mark.parametrize(("sizes", "billions"), [(SEVENTY, 70.55), (EIGHT, 8.03)])
def test_large_models_from_headers_alone(tmp_path: Path, sizes: dict[str, int], billions: float) -> None:
    a, b = llama(tmp_path / "a", **sizes), llama(tmp_path / "b", **sizes)
    found = mergeid.estimate(a, b)
    assert isinstance(found, Estimate) and found.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    plain, tuned, copies, matched = found.costs
    assert plain.memory == tuned.memory < 300 << 20, "whatever their size"
    assert plain.disk == tuned.disk == copies.disk == matched.disk == found.bytes[0] == found.parameters * 2
    assert plain.seconds < tuned.seconds < copies.seconds < matched.seconds
    assert tuned.memory < copies.memory < matched.memory
    inner = sizes["inner"]
    assert 4 * inner * inner < matched.memory < 6 * 4 * inner * inner + (2 << 30), (
        "a few matrices over pairs of neurons"
    )
    assert found.fits == (found.bytes[0] <= found.free)


def test_small_models_and_the_table(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        save_file({"w": torch.randn(30, 20, generator=generator)}, tmp_path / f"{name}.safetensors")
    found = mergeid.estimate(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    told = found.to_json()
    assert told["parameters"] == 600 and told["bytes"] == [2400, 2400] and told["fits"]
    assert [w["way"] for w in told["ways"]] == ["as they are", "fine-tunes", "permuted copies", "independent"]
    out = io.StringIO()
    print_estimate(found, Console(file=out, width=200))
    said = out.getvalue()
    assert "memory" in said and "fine-tunes" in said and "factor of about two" in said


def test_models_that_do_not_fit_are_said_to(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, 4)}, tmp_path / "a.safetensors")
    save_file({"v": torch.zeros(3, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(mergeid.MergeidError, match="are different architectures"):
        mergeid.estimate(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
