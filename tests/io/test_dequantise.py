"""Quantised weights read as floating-point ones, against plain loops over the formats' definitions."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mergeid
from mergeid import MergeidError
from mergeid.io.dequantise import dequantised, refuse_quantised
from mergeid.io.opening import open_checkpoint

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # fmt: skip


def _folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def _weight(rows: int = 6, columns: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["blocks", "rows", "one number", "none"])
def test_float8_with_scales(tmp_path: Path, layout: str) -> None:
    w = _weight()
    block = {"blocks": (4, 4), "rows": (1, 10), "one number": (6, 10), "none": (6, 10)}[layout]
    grid = [-(-n // b) for n, b in zip(w.shape, block, strict=True)]
    scales, stored = torch.ones(grid), torch.zeros_like(w)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = 1.0 if layout == "none" else w[place].abs().max() / 448
            stored[place] = w[place] / scales[i, j]
    stored8 = stored.to(torch.float8_e4m3fn)
    expected = torch.zeros_like(w)
    for i in range(6):
        for j in range(10):
            expected[i, j] = stored8[i, j].float() * scales[i // block[0], j // block[1]]
    name = {"blocks": "l.weight_scale_inv", "rows": "l.weight_scale", "one number": "l.scale_weight"}.get(layout)
    tensors = {"l.weight": stored8, "n.weight": torch.ones(10), "l.input_scale": torch.ones(1)}
    if name is not None:
        tensors[name] = scales.reshape(()) if layout == "one number" else scales
    settings = {"quant_method": "fp8", **({"weight_block_size": [4, 4]} if layout == "blocks" else {})}
    folder = _folder(tmp_path / "m", tensors, torch_dtype="float32", quantization_config=settings)
    found = dequantised(open_checkpoint(folder))
    assert set(found.table) == {"l.weight", "n.weight"} and found.config == {"torch_dtype": "float32"}
    assert torch.equal(found.tensor("l.weight"), expected)


def test_int8_rows(tmp_path: Path) -> None:
    w = _weight()
    largest = w.abs().amax(1)
    stored = torch.tensor([[round(float(w[i, j] / largest[i] * 127)) for j in range(10)] for i in range(6)]).to(
        torch.int8
    )
    tensors = {"l.weight": stored, "l.SCB": largest, "l.weight_format": torch.zeros(1, dtype=torch.uint8)}
    folder = _folder(tmp_path / "m", tensors, dtype="float32", quantization_config={"load_in_8bit": True})
    found = dequantised(open_checkpoint(folder))
    assert list(found.table) == ["l.weight"]
    torch.testing.assert_close(found.tensor("l.weight"), stored.float() * largest[:, None] / 127)
    assert (found.tensor("l.weight") - w).abs().max() < 0.51 * largest.max() / 127


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_blocks(tmp_path: Path, nested: bool) -> None:
    """Nearest codes by a plain loop; two codes in a byte, the first in its upper half; scales quantised too."""
    w, size = _weight(8, 16), 16
    flat, codes, largest = w.flatten().tolist(), [], []
    for start in range(0, len(flat), size):
        piece = flat[start : start + size]
        largest.append(max(abs(x) for x in piece))
        codes += [min(range(16), key=lambda c, x=x: abs(NF4[c] - x / largest[-1])) for x in piece]
    packed = torch.tensor([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": [8, 16]}
    tensors = {"l.weight": packed[:, None], "l.weight.quant_map": torch.tensor(NF4)}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), sum(largest) / len(largest)
        inner = [max(abs(x - offset) for x in largest[i : i + 4]) for i in range(0, len(largest), 4)]
        marks = [
            min(range(256), key=lambda c, i=i: abs(float(table[c]) - (largest[i] - offset) / inner[i // 4]))
            for i in range(len(largest))
        ]
        largest = [float(table[c]) * inner[i // 4] + offset for i, c in enumerate(marks)]
        tensors |= {"l.weight.absmax": torch.tensor(marks, dtype=torch.uint8)}
        tensors |= {"l.weight.nested_absmax": torch.tensor(inner), "l.weight.nested_quant_map": table}
        state |= {"nested_blocksize": 4, "nested_offset": offset, "nested_dtype": "float32"}
    else:
        tensors["l.weight.absmax"] = torch.tensor(largest)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["l.weight.quant_state.bitsandbytes__nf4"] = text
    folder = _folder(tmp_path / "m", tensors, quantization_config={"load_in_4bit": True})
    found = dequantised(open_checkpoint(folder))
    assert list(found.table) == ["l.weight"]
    expected = torch.tensor([NF4[c] * largest[i // size] for i, c in enumerate(codes)]).reshape(8, 16)
    torch.testing.assert_close(found.tensor("l.weight"), expected, rtol=1e-5, atol=1e-6)
    assert (found.tensor("l.weight") - w).abs().max() < 0.5


def test_merge_of_a_quantised_and_a_plain_model(tmp_path: Path) -> None:
    """Refused without the option, which it names; with it the average, and a config that says nothing of it."""
    w = _weight()
    stored = w.to(torch.float8_e4m3fn)
    a = _folder(
        tmp_path / "a", {"l.weight": stored}, torch_dtype="float32", quantization_config={"quant_method": "fp8"}
    )
    b = _folder(tmp_path / "b", {"l.weight": w}, torch_dtype="float32")
    with pytest.raises(MergeidError, match="--dequantise"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")
    mergeid.merge(a, b, output=tmp_path / "out", match="never", dequantise=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged["l.weight"], (stored.float() + w) / 2)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_every_verb_that_opens_models(tmp_path: Path) -> None:
    """A float8 model is to all of them what its weights are in float32."""
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    b = tmp_path / "b"
    LlamaForCausalLM(config).save_pretrained(b)
    plain = load_file(b / "model.safetensors")
    stored = {n: w.to(torch.float8_e4m3fn) if "proj" in n else w for n, w in plain.items()}
    told = json.loads((b / "config.json").read_text())
    a = _folder(tmp_path / "a", stored, **told, quantization_config={"quant_method": "fp8"})
    same = _folder(tmp_path / "same", {n: w.float() for n, w in stored.items()}, **told)
    data = tmp_path / "data.npz"
    inputs = torch.randint(0, 24, (8, 6), generator=torch.Generator().manual_seed(0))
    np.savez(data, inputs=inputs, labels=inputs)
    for verb in (mergeid.plan, mergeid.predict):
        with pytest.raises(MergeidError, match="--dequantise"):
            verb(a, b)
    for verb in (
        mergeid.plan,
        mergeid.predict,
        partial(mergeid.barrier, data=data, points=3),
        partial(mergeid.similarity, data=data),
    ):
        one, two = verb(a, b, dequantise=True), verb(same, b)
        said = [json.dumps(r.to_json()).replace(str(m), "a") for r, m in ((one, a), (two, same))]
        assert said[0] == said[1]
    assert mergeid.graph(a, dequantise=True).to_json()["spaces"] == mergeid.graph(same).to_json()["spaces"]
    mergeid.scramble(a, output=tmp_path / "moved", dequantise=True)
    moved, other = (mergeid.load(m, dequantise=True).model(inputs).logits for m in (tmp_path / "moved", a))
    torch.testing.assert_close(moved, other)
    mergeid.extract(b, base=a, output=tmp_path / "adapter", rank=16, dequantise=True)
    mergeid.merge(f"{a}+{tmp_path / 'adapter'}", b, output=tmp_path / "out", match="never", dequantise=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in plain.items():  # of full rank, so that the adapter gives b back
        torch.testing.assert_close(merged[name].float(), w, rtol=0, atol=1e-5)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "m", {"l.qweight": torch.ones(4, dtype=torch.int32)}, quantization_config={"bits": 4})
    with pytest.raises(MergeidError, match="does not know"):
        dequantised(open_checkpoint(folder))
    told = {"quant_method": "awq"}
    folder = _folder(tmp_path / "n", {"l.qweight": torch.ones(4, dtype=torch.int32)}, quantization_config=told)
    with pytest.raises(MergeidError, match=r"does not know \(awq\)"):
        dequantised(open_checkpoint(folder))
    with pytest.raises(
        MergeidError, match=r"json: awq.; expected float weights: dequantise it with the tool that made"
    ):
        mergeid.merge(folder, folder, output=tmp_path / "out")


@pytest.mark.parametrize(
    "kind", ["weight_packed weight_scale", "gate_blocks gate_scales", "weight._data weight._scale", "W_q scale"]
)
@pytest.mark.parametrize("asked", [False, True])
def test_packed_weights_that_no_config_tells_of_are_refused(tmp_path: Path, kind: str, asked: bool) -> None:
    """Their whole numbers would be A's, and the scales beside them an average. Scales may be in float8."""
    values, scales = (f"layers.0.{n}" for n in kind.split())
    paths = []
    for i in range(2):
        packed = {values: torch.full((4, 8), i, dtype=torch.uint8), "norm.weight": _weight(1)[0]}
        save_file({**packed, scales: _weight(4, 1, i).to(torch.float8_e4m3fn)}, tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    output = tmp_path / "out.safetensors"
    if not asked:  # float8 is refused before all
        for path in paths:
            save_file({k: t.float() if "cale" in k else t for k, t in load_file(path).items()}, path)
    with pytest.raises(MergeidError, match=r"with scales beside it.*: dequantise it with the tool that made it"):
        mergeid.merge(*paths, output=output, match="never", dequantise=asked)
    assert not output.exists()


def test_tables_of_whole_numbers_are_no_quantised_weights(tmp_path: Path) -> None:
    """Positions of Swin's bias tables, which lie beside a scale of another thing; counters of fake quantisation."""
    tables = {
        "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "attn.logit_scale": torch.ones(2, 1),
    }
    tables |= {"fc.scale": torch.ones(1), "fc.zero_point": torch.zeros(1, dtype=torch.int32), "fc.weight": _weight()}
    tables |= {"codes.index": torch.zeros(2, 2, dtype=torch.int64), "codes.scale": torch.ones(2)}
    for step, name in enumerate("ab"):
        state = {k: t + step if t.is_floating_point() else t for k, t in tables.items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    output = tmp_path / "o.safetensors"
    mergeid.merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", output=output, match="never")
    torch.testing.assert_close(load_file(output)["fc.weight"], tables["fc.weight"] + 0.5)


def test_floating_point_weights_under_a_config_that_says_otherwise(tmp_path: Path) -> None:
    """What training tools leave of an adapter that they merged into a quantised base. It was refused either way."""
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for seed, name in enumerate("ab"):
        _folder(tmp_path / name, {"l.weight": torch.full((2, 2), float(seed))}, quantization_config=told)
    with pytest.raises(MergeidError, match="give --dequantise"):
        mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", match="never")
    mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "out", match="never", dequantise=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["l.weight"].tolist() == [[0.5, 0.5]] * 2
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


EIGHT = torch.ones(8, 6).to(torch.float8_e4m3fn)
INTEGERS = torch.ones(8, 6, dtype=torch.int8)
NORMAL = {"shape": [8, 6], "blocksize": 64, "dtype": "bfloat16"}


def _normal4(told: dict[str, Any], **parts: Tensor) -> dict[str, Tensor]:
    """A tensor [8, 6] as bitsandbytes' nf4, and what else lies beside it."""
    state = torch.tensor(list(json.dumps({**NORMAL, **told}).encode()), dtype=torch.uint8)
    found = {"quant_state.bitsandbytes__nf4": state, "absmax": torch.ones(1), "quant_map": torch.ones(16), **parts}
    return {"l.weight": torch.ones(24, 1, dtype=torch.uint8), **{f"l.weight.{n}": t for n, t in found.items()}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"l.weight": EIGHT, "l.weight_scale": torch.ones(8, 6, 1)}, r"l.weight_scale \[8, 6, 1\] does not fit"),
        ({"l.weight": EIGHT, "l.weight_scale": torch.ones(6)}, "the scales of 'l.weight' .* are 6 for 8"),
        ({"l.weight": INTEGERS, "l.SCB": torch.ones(7)}, r"l.SCB \[7\] does not fit .* a scale for each row"),
        ({"l.weight": INTEGERS, "l.SCB": torch.ones(())}, r"l.SCB \[\] does not fit"),
        (_normal4({}, quant_map=torch.ones(3)), "l.weight.quant_map of .* has 3 numbers; expected 16"),
        (_normal4({"blocksize": 16}), "l.weight.absmax of .* has 1 numbers; expected 3"),
        (
            _normal4({}, absmax=torch.ones(1, dtype=torch.uint8), nested_absmax=torch.ones(1)),
            "lacks nested_blocksize or nested_offset",
        ),
        (
            _normal4(
                {"nested_blocksize": 4, "nested_offset": 0.0}, absmax=torch.ones(1, dtype=torch.uint8),
                nested_absmax=torch.ones(1), nested_quant_map=torch.ones(9),
            ),
            "nested_quant_map of .* has 9 numbers; expected 256",
        ),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = _folder(tmp_path / "m", tensors)
    with pytest.raises(MergeidError, match=message):
        dequantised(open_checkpoint(folder)).tensor("l.weight")


def test_scales_in_float8_are_no_weights(tmp_path: Path) -> None:
    """Powers of two, as the MX formats have them."""
    scales = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    tensors = {"l.weight": EIGHT, "l.weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
    found = dequantised(open_checkpoint(_folder(tmp_path / "m", tensors, torch_dtype="float32")))
    assert list(found.table) == ["l.weight"]
    expected = scales.repeat_interleave(4, 0).repeat_interleave(3, 1)
    assert torch.equal(found.tensor("l.weight"), expected)


def test_a_scale_for_each_expert(tmp_path: Path) -> None:
    stored = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([0.5, 2.0, 3.0])
    tensors = {"experts.weight": stored, "experts.weight_scale": scales}
    folder = _folder(tmp_path / "m", tensors, torch_dtype="float32", quantization_config={"quant_method": "fp8"})
    found = dequantised(open_checkpoint(folder)).tensor("experts.weight")
    for e in range(3):
        torch.testing.assert_close(found[e], stored[e].float() * scales[e])


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.position_ids": torch.arange(4)[None], "m.position_scale": torch.ones(1)},
        {"m.mask": torch.ones(4, 4, dtype=torch.bool), "m.mask_scale": torch.ones(1)},
        {"m.table_index": torch.zeros(4, 4, dtype=torch.int32), "m.table_scale": torch.ones(1)},
        {"m.relative": torch.zeros(4, 4, dtype=torch.int64), "m.relative_scale": torch.ones(3)},
    ],
    ids=["places", "mask", "table", "relative"],
)
def test_places_and_masks_beside_a_scale_are_no_weights(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """They were refused as packed weights."""
    found = open_checkpoint(_folder(tmp_path / "m", {**tensors, "m.weight": torch.ones(3, 3)}))
    refuse_quantised(found, list(found.table))
