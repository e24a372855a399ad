"""Models made for images of different sizes: tables of positions as timm itself resamples them, whichever size counts.

The oracle is timm's own loader: ``create_model(…, pretrained=True)`` of the other model's file at the size that counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergeid
from mergeid.commands.cli import run
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint
from mergeid.io.written import RecordFile
from mergeid.models import sizes
from mergeid.models.sizes import same_sizes
from mergeid.request.request import Reading

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # of timm's own code
]
SWIN = {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}
THIN = {"depth": 2, "embed_dim": 24, "num_heads": 2}
PAIRS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "vit": (("test_vit", {"img_size": 64}), ("test_vit", {"img_size": 96})),
    "to the default size": (("test_vit", {}), ("test_vit", {"img_size": 64})),
    "names with sizes": (("vit_tiny_patch16_224", THIN), ("vit_tiny_patch16_384", THIN)),
    "two class tokens": (
        ("deit_tiny_distilled_patch16_224", {**THIN, "img_size": 64}),
        ("deit_tiny_distilled_patch16_224", {**THIN, "img_size": 32}),
    ),
    "beit": (
        ("beit_base_patch16_224", {**THIN, "img_size": 48}),
        ("beit_base_patch16_224", {**THIN, "img_size": 80}),
    ),
    "eva": (
        ("eva02_tiny_patch14_224", {**THIN, "img_size": 56}),
        ("eva02_tiny_patch14_224", {**THIN, "img_size": 84}),
    ),
    "swin windows": (("swin_tiny_patch4_window7_224", SWIN), ("swin_base_patch4_window12_384", SWIN)),
    "coatnet": (("test_coatnet", {"img_size": 64}), ("test_coatnet", {"img_size": 96})),
    "oblong target": (("test_vit", {"img_size": (64, 96)}), ("test_vit", {"img_size": 96})),
}


def random_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Every float tensor drawn anew, so that no table is zero."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    drawn = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in state.items() if v.is_floating_point()}
    return {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in {**state, **drawn}.items()}


def build(name: str, options: dict[str, Any], **more: Any) -> nn.Module:
    return timm.create_model(name, num_classes=4, **options, **more).eval()


def save(folder: Path, name: str, options: dict[str, Any], seed: int, dtype: Any = torch.float32) -> Path:
    """A folder as on the hub, with the options in its config."""
    folder.mkdir(parents=True)
    state = random_weights(build(name, options), seed)
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, folder / "model.safetensors")
    config = {"architecture": name, "num_classes": 4, "model_args": options}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_timm_loads(file: Path, name: str, options: dict[str, Any]) -> nn.Module:
    """timm's model of that name and size with the weights of a file, through timm's own loading."""
    return build(name, options, pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 4})


def only(b: Path | str, a: Path | str, output: Path, **told: Any) -> dict[str, Tensor]:
    """B alone, in A's place."""
    mergeid.merge(a, b, output=output, weights=[0, 1], match="never", **told)
    return load_file(output / "model.safetensors" if output.is_dir() else output)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """ViTs of 64 and 96 pixels."""
    return tuple(save(tmp_path / x, *PAIRS["vit"][i], seed=i) for i, x in enumerate("ab"))  # type: ignore[return-value]


@pytest.mark.parametrize("case", PAIRS)
def test_the_other_model_is_the_one_that_timm_loads(case: str, tmp_path: Path) -> None:
    first, second = PAIRS[case]
    a, b = save(tmp_path / "a", *first, seed=0), save(tmp_path / "b", *second, seed=1)
    found = only(b, a, tmp_path / "out")
    oracle = as_timm_loads(b / "model.safetensors", *first)
    assert found.keys() == oracle.state_dict().keys()
    for key, value in oracle.state_dict().items():
        assert torch.equal(found[key], value), key
    again = build(*first)
    again.load_state_dict(found)
    size = mergeid.load(tmp_path / "out").example["x"].shape[-2:]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(x), oracle(x))


@pytest.mark.slow
def test_a_merge_of_two_sizes_is_that_of_one_size(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Plan, merge and align treat B as a model that timm had loaded at A's size; bit for bit, and match finds A."""
    a, b = pair
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    state = as_timm_loads(b / "model.safetensors", "test_vit", {"img_size": 64}).state_dict()
    save_file(state, loaded / "model.safetensors")
    (loaded / "config.json").write_text((a / "config.json").read_text())
    for match in ("never", "always"):
        outs = [tmp_path / f"{match}{i}" for i in range(2)]
        for out, other in zip(outs, (b, loaded), strict=True):
            mergeid.merge(a, other, output=out, match=match)
        one, two = (load_file(out / "model.safetensors") for out in outs)
        assert all(torch.equal(one[k], two[k]) for k in one)
    plans = [mergeid.plan(a, other).to_json() for other in (b, loaded)]
    assert plans[0]["spaces"] == plans[1]["spaces"]
    assert "resampled to the 64x64 pixels" in plans[0]["notes"][0]
    aligned = [tmp_path / f"aligned{i}" for i in range(2)]
    for out, other in zip(aligned, (b, loaded), strict=True):
        mergeid.align(other, a, output=out)
    one, two = (load_file(out / "model.safetensors") for out in aligned)
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_a_scrambled_and_resized_model_is_found_again(tmp_path: Path) -> None:
    """A at 96 pixels with its neurons in another order: resized by timm's rule and matched, it is A again."""
    a = save(tmp_path / "a", "test_vit", {"img_size": 96}, seed=0)
    big = save(tmp_path / "big", "test_vit", {"img_size": 128}, seed=0)
    state = load_file(a / "model.safetensors")
    grown = as_timm_loads(a / "model.safetensors", "test_vit", {"img_size": 128}).state_dict()
    save_file(grown, big / "model.safetensors")
    mergeid.scramble(big, output=tmp_path / "moved", seed=3)
    mergeid.merge(a, tmp_path / "moved", output=tmp_path / "out", match="always")
    found = load_file(tmp_path / "out" / "model.safetensors")
    tables = {"pos_embed"}
    assert all(torch.equal(found[k], state[k]) for k in state if k not in tables)
    there_and_back = as_timm_loads(big / "model.safetensors", "test_vit", {"img_size": 96}).state_dict()["pos_embed"]
    assert torch.allclose(found["pos_embed"], (state["pos_embed"] + there_and_back) / 2, atol=1e-7)


@pytest.mark.parametrize("told", [{"config": "b"}, {"image_size": 96}], ids=["config", "image size"])
def test_the_result_may_have_the_other_size(told: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    result = mergeid.merge(a, b, output=tmp_path / "out", match="never", **told)
    found = load_file(tmp_path / "out" / "model.safetensors")
    grown = as_timm_loads(a / "model.safetensors", "test_vit", {"img_size": 96}).state_dict()
    own = load_file(b / "model.safetensors")
    assert all(torch.equal(found[k], (grown[k] + own[k]) / 2) for k in own)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"] == {"img_size": 96}
    assert mergeid.load(tmp_path / "out").model.patch_embed.img_size == (96, 96)
    assert result.notes == [
        f"{a} was made for images of 64x64 pixels: its pos_embed is resampled to the 96x96 pixels of {b}, as timm does"
    ]


def test_it_is_said_and_recorded(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    assert run(["merge", str(a), str(b), "-o", str(tmp_path / "out"), "--match", "never"]) == 0
    assert "its pos_embed is resampled to the 64x64 pixels of" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out" / "mergeid.json").read_text())
    assert record["resized"] == [{"source": str(b), "size": [96, 96], "to": [64, 64], "tensors": ["pos_embed"]}]
    TypeAdapter(RecordFile).validate_python(record)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((a / "config.json").read_text())


def test_files_without_a_config_and_with_prefixes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (x / "model.safetensors" for x in pair)
    wrapped = tmp_path / "wrapped.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(b).items()}, wrapped)
    plain, bare = only(b, a, tmp_path / "1.safetensors"), only(wrapped, a, tmp_path / "2.safetensors")
    oracle = as_timm_loads(b, "test_vit", {"img_size": 64}).state_dict()
    assert all(torch.equal(plain[k], v) and torch.equal(bare[k], v) for k, v in oracle.items())


@pytest.mark.parametrize("without", "ab")
def test_one_config_for_both(without: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The config that is there describes the result, at A's size."""
    a, b = pair
    (tmp_path / without / "config.json").unlink()
    mergeid.merge(a, b, output=tmp_path / "out", match="never")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "test_vit" and config["model_args"] == {"img_size": 64}
    assert mergeid.load(tmp_path / "out").model.pos_embed.shape[1] == 17


def test_the_base_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    base = save(tmp_path / "base", "test_vit", {"img_size": 32}, seed=5)
    mergeid.merge(
        a, b, base=base, method="task_arithmetic", weights=[0.5, 0.25], output=tmp_path / "out", match="never"
    )
    found = load_file(tmp_path / "out" / "model.safetensors")["pos_embed"].double()
    one, two, origin = (
        as_timm_loads(x / "model.safetensors", "test_vit", {"img_size": 64}).state_dict()["pos_embed"].double()
        for x in (a, b, base)
    )
    assert torch.allclose(found, origin + 0.5 * (one - origin) + 0.25 * (two - origin), atol=1e-7)


def test_sixteen_bits_are_rounded_once(tmp_path: Path) -> None:
    a = save(tmp_path / "a", *PAIRS["beit"][0], seed=0, dtype=torch.bfloat16)
    b = save(tmp_path / "b", *PAIRS["beit"][1], seed=1, dtype=torch.bfloat16)
    wide = tmp_path / "wide.safetensors"
    save_file({k: v.float() for k, v in load_file(b / "model.safetensors").items()}, wide)
    found, oracle = only(b, a, tmp_path / "out"), as_timm_loads(wide, *PAIRS["beit"][0]).state_dict()
    assert all(torch.equal(found[k], oracle[k].bfloat16()) for k in found)


def test_a_grid_that_is_not_square_goes_as_timm_sets_a_size(tmp_path: Path) -> None:
    a = save(tmp_path / "a", "test_vit", {"img_size": 64}, seed=0)
    b = save(tmp_path / "b", "test_vit", {"img_size": (32, 128)}, seed=1)  # 16 patches as well: nothing to resample
    with pytest.raises(MergeidError, match="img_size"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")
    c = save(tmp_path / "c", "test_vit", {"img_size": (32, 96)}, seed=1)
    found = only(c, a, tmp_path / "out")
    oracle = build("test_vit", {"img_size": (32, 96)})
    oracle.load_state_dict(load_file(c / "model.safetensors"))
    oracle.set_input_size(img_size=(64, 64))  # type: ignore[operator]
    assert all(torch.equal(found[k], v) for k, v in oracle.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "tensor"),
    [
        ("mixer_s32_224", ({"img_size": 64}, {"img_size": 96}), "blocks.0.mlp_tokens.fc1.weight"),
        ("cait_xxs24_224", ({**THIN, "img_size": 32}, {**THIN, "img_size": 64}), "pos_embed"),
        ("beit_base_patch16_224", ({**THIN, "img_size": 64}, {**THIN, "img_size": (32, 96)}), "relative_position"),
    ],
)
def test_what_timm_does_not_resample_is_refused_in_a_sentence(
    name: str, options: tuple[dict[str, Any], ...], tensor: str, tmp_path: Path
) -> None:
    a, b = (save(tmp_path / x, name, o, seed=0) for x, o in zip("ab", options, strict=True))
    with pytest.raises(MergeidError) as error:
        mergeid.merge(a, b, output=tmp_path / "out", match="never")
    text = str(error.value)
    assert tensor in text and "timm resamples no such tensor: expected models of one image size" in text
    assert text.startswith(f"{b} was made for images of") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_vit2", {"img_size": 96}), ("test_vit", {"img_size": 96, "depth": 3}), ("test_vit", {"qkv_bias": False})],
)
def test_other_architectures_are_not_resized(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    a = save(tmp_path / "a", "test_vit", {"img_size": 64}, seed=0)
    b = save(tmp_path / "b", name, options, seed=1)
    with pytest.raises(MergeidError) as error:
        mergeid.merge(a, b, output=tmp_path / "out", match="never")
    assert "resample" not in str(error.value)


def test_equal_sizes_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same checkpoints come back, and no architecture is looked for."""

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(sizes, "find_architecture", refuse)
    models: list[Checkpoint] = [
        open_checkpoint(save(tmp_path / x, "test_vit", {"img_size": 64}, seed=i)) for i, x in enumerate("ab")
    ]
    found = same_sizes(models, Reading(), 2)
    assert all(x is y for x, y in zip(found.models, models, strict=True)) and not found.notes and not found.resized


def test_skipped_tables_stay_the_first_ones(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    mergeid.merge(a, b, output=tmp_path / "out", match="never", skip=["pos_embed"], config="a")
    found, own = (load_file(x / "model.safetensors")["pos_embed"] for x in (tmp_path / "out", a))
    assert torch.equal(found, own)


def test_heads_that_differ_are_still_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    state = load_file(b / "model.safetensors")
    save_file({k: v[:3].clone() if k.startswith("head.") else v for k, v in state.items()}, b / "model.safetensors")
    (b / "config.json").write_text((b / "config.json").read_text().replace('"num_classes": 4', '"num_classes": 3'))
    with pytest.raises(MergeidError, match="head"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")


@pytest.mark.parametrize(
    "told",
    [
        {}, {"_name_or_path": "me/vision-image"}, {"id2label": {0: "image"}}, {"patch_size": 16}, {"image_size": 224},
        {"image_token_id": 7}, {"vision_config": None}, {"vision_feature_layer": -2}, {"use_image": False},
        {"pixel_values": None}, {"task_specific_params": {"image": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_texts_have_no_size(tmp_path: Path, told: dict[str, Any]) -> None:
    """Also where no data is given that would be refused for it, whatever else their config tells."""
    config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **told}
    for seed in range(2):
        torch.manual_seed(seed)
        net = transformers.BertForMaskedLM(transformers.BertConfig(**config, intermediate_size=24))
        net.save_pretrained(tmp_path / str(seed))
    with pytest.raises(MergeidError, match=r"transformers/bert takes no images; leave out --image-size"):
        mergeid.merge(tmp_path / "0", tmp_path / "1", output=tmp_path / "m", match="never", image_size=32)
    assert not (tmp_path / "m").exists()


def test_images_without_kernels_may_have_one(tmp_path: Path) -> None:
    """It was refused where no tensor's name speaks of images, as if the model took none."""
    config = transformers.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=261, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=1, num_labels=3,
    )  # fmt: skip
    for seed in range(2):
        torch.manual_seed(seed)
        transformers.PerceiverForImageClassificationFourier(config).save_pretrained(tmp_path / str(seed))
    mergeid.merge(tmp_path / "0", tmp_path / "1", output=tmp_path / "m", match="never", image_size=32, force=True)


def test_texts_with_images_may_have_one(tmp_path: Path) -> None:
    """It was refused for models of both, as if they took no images."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {**small, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config={**small, "vocab_size": 40}, vision_config=vision)
    for name in ("0", "1"):
        transformers.CLIPModel(config).save_pretrained(tmp_path / name)
    mergeid.merge(tmp_path / "0", tmp_path / "1", output=tmp_path / "m", match="never", image_size=32, force=True)
    assert (tmp_path / "m").is_dir()
