"""A quantised model is to every verb what its weights are in float32, dequantised here by plain loops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergeid
from mergeid import MergeidError

NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # fmt: skip
BLOCK = 16
FORMATS = ("float8", "int8", "nf4")


def quantised(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """What is stored of a weight, and what that means, number by number."""
    found = np.zeros(tuple(weight.shape), np.float32)
    if kind == "float8":
        scale = float(weight.abs().max()) / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        factor = np.float32(scale)
        for at in np.ndindex(found.shape):
            found[at] = np.float32(stored[at].float()) * factor
        return {name: stored, f"{name}_scale": torch.tensor(scale)}, found
    flat = weight.flatten().tolist()
    if kind == "int8":
        rows = weight.abs().amax(1)
        codes8 = torch.tensor([[round(float(x / m * 127)) for x in row] for row, m in zip(weight, rows, strict=True)])
        for i, j in np.ndindex(found.shape):
            found[i, j] = np.float32(codes8[i, j]) * (np.float32(rows[i]) / np.float32(127))
        return {name: codes8.to(torch.int8), f"{name.removesuffix('.weight')}.SCB": rows}, found
    largest = [max(map(abs, flat[i : i + BLOCK])) for i in range(0, len(flat), BLOCK)]
    codes = [min(range(16), key=lambda c: abs(NF4[c] - x / largest[i // BLOCK])) for i, x in enumerate(flat)]
    packed = torch.tensor([16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    for i, c in enumerate(codes):
        found.flat[i] = np.float32(NF4[c]) * np.float32(largest[i // BLOCK])
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: packed[:, None], f"{name}.absmax": torch.tensor(largest), f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": text,
    }, found  # fmt: skip


def folder(place: Path, tensors: dict[str, Tensor], **more: Any) -> Path:
    place.mkdir()
    save_file(tensors, place / "model.safetensors")
    options = {"in_chans": 1}
    config = {"architecture": "test_resnet", "num_classes": 4, "model_args": options, "torch_dtype": "float32", **more}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module", params=FORMATS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """a as it is stored and as floats, b, and data. float8: all matrices and kernels; the others, of bitsandbytes,
    know linear layers alone."""
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    x = torch.randn(24, 1, 32, 32)
    np.savez(place / "data.npz", x=x.numpy(), labels=np.arange(24) % 4)
    found = {"data": place / "data.npz"}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=4, in_chans=1).train()
        model(x)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        found[name] = folder(place / name, state)
        if seed:
            continue
        stored, floats = dict(state), dict(state)
        for key, value in state.items():
            if value.dim() == 2 or (value.dim() > 2 and request.param == "float8"):
                del stored[key]
                parts, meant = quantised(key, value, request.param)
                stored |= parts
                floats[key] = torch.from_numpy(meant)
        found["stored"] = folder(place / "stored", stored, quantization_config={"quant_method": request.param})
        found["floats"] = folder(place / "floats", floats)
    return found


def told(found: Any, model: Path) -> str:
    return json.dumps(found.to_json(), default=str).replace(str(model), "A").replace(f'"{model.name}"', '"A"')


@pytest.fixture
def refuses(models: dict[str, Path]) -> Callable[..., None]:
    """Without the option a verb names it."""

    def check(verb: Callable[..., Any]) -> None:
        with pytest.raises(MergeidError, match="--dequantise"):
            verb(models["stored"])

    return check


def both(models: dict[str, Path], verb: Callable[..., Any]) -> list[Any]:
    """What a verb finds of the stored model, and of the floats."""
    return [verb(models["stored"], dequantise=True), verb(models["floats"])]


def test_sketch(models: dict[str, Path], tmp_path: Path, refuses: Callable[..., None]) -> None:
    def sketch(a: Path, **more: Any) -> dict[str, Tensor]:
        mergeid.sketch(a, data=models["data"], output=tmp_path / f"{a.name}.sketch", **more)
        return load_file(tmp_path / f"{a.name}.sketch")

    refuses(sketch)
    one, two = both(models, sketch)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("one_head", [False, True])
def test_zip(one_head: bool, models: dict[str, Path], tmp_path: Path, refuses: Callable[..., None]) -> None:
    def zipped(a: Path, **more: Any) -> dict[str, Tensor]:
        out = tmp_path / f"{a.name}-zip"
        mergeid.zip_models(a, models["b"], data=models["data"], output=out, one_head=one_head, **more)
        files = sorted(out.rglob("*.safetensors"))
        assert len(files) == 2 - one_head
        return {f"{f.relative_to(out)}/{k}": v for f in files for k, v in load_file(f).items()}

    refuses(zipped)
    one, two = both(models, zipped)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    if not one_head:
        trunk = mergeid.load_zipped(tmp_path / "stored-zip")
        assert all(len(x) == 8 for x in trunk(torch.randn(8, 1, 32, 32)))


@pytest.mark.slow
def test_report(models: dict[str, Path], tmp_path: Path, refuses: Callable[..., None]) -> None:
    """The same page but for the option, with the default merge and all that is measured."""

    def report(a: Path, **more: Any) -> str:
        page = tmp_path / "report.html"
        page.unlink(missing_ok=True)
        mergeid.report(a, models["b"], data=models["data"], output=page, points=3, **more)
        text = page.read_text().replace(str(a), "A").replace(f">{a.name}<", ">A<")
        return re.sub(r'class="bytes">[^<]*|sha256 \w+|Time</dt><dd>[^<]*', "", text)

    refuses(report)
    one, two = both(models, report)
    assert "--dequantise" in one and "--dequantise" not in two
    assert one.replace(" --dequantise", "") == two


@pytest.mark.slow
def test_plan_predict_rank_and_barrier(models: dict[str, Path], refuses: Callable[..., None]) -> None:
    b, data = models["b"], models["data"]
    verbs: list[Callable[..., Any]] = [
        lambda a, **more: mergeid.plan(a, b, data=data, **more),
        lambda a, **more: mergeid.predict(a, b, data=data, **more),
        lambda a, **more: mergeid.rank([a, b, b.parent / "a"], **more),
        lambda a, **more: mergeid.barrier(a, b, data=data, points=3, **more),
        lambda a, **more: mergeid.similarity(a, b, data=data, **more),
    ]
    for verb in verbs:
        refuses(verb)
        one, two = both(models, verb)
        assert told(one, models["stored"]) == told(two, models["floats"])


@pytest.mark.slow
def test_merge_align_scramble_and_soup(models: dict[str, Path], tmp_path: Path, refuses: Callable[..., None]) -> None:
    b, data = models["b"], models["data"]

    def soup(a: Path, output: Path, **more: Any) -> None:
        mergeid.soup([a, b], data=data, match="never", output=output, **more)

    def merge(a: Path, output: Path, **more: Any) -> None:
        mergeid.merge(a, b, match="always", output=output, **more)

    def align(a: Path, output: Path, **more: Any) -> None:
        mergeid.align(a, b, output=output, **more)

    def scramble(a: Path, output: Path, **more: Any) -> None:
        mergeid.scramble(a, output=output, seed=1, **more)

    for verb in (merge, align, scramble, soup):

        def written(a: Path, verb: Callable[..., None] = verb, **more: Any) -> dict[str, Tensor]:
            out = tmp_path / f"{verb.__name__}-{a.name}"
            verb(a, out, **more)
            assert "quantization_config" not in (out / "config.json").read_text()
            return load_file(out / "model.safetensors")

        refuses(written)
        one, two = both(models, written)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), verb.__name__
