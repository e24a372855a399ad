"""Every kind of data that a user may have, as items that fit the model; and what does not fit, named."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mergeid_timm import TimmAdapter
from mergeid_transformers import TransformersAdapter
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from mergeid.data import Item, collate, load_data
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.plugins import Architecture

TIMM, HF = TimmAdapter(), TransformersAdapter()
RESNET = Architecture("timm", "resnet18", {"num_classes": 4})
VIT = Architecture("timm", "vit_tiny_patch16_224", {"num_classes": 4})
GREY = Architecture("timm", "resnet18", {"num_classes": 4, "in_chans": 1})
MASKED = Architecture(
    "transformers",
    "bert",
    {"config": {"model_type": "bert", "vocab_size": 30522}, "model_class": "BertForMaskedLM"},
)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Classes 2 and 10 (three plain-coloured images each), of another size than the model's."""
    for number, name in enumerate(("2", "10")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (80, 60), (40 * i, 90 * number, 7)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.filterwarnings("ignore:the 2 class sub-folders")
def test_image_folder(image_folder):
    data = load_data(str(image_folder), adapter=TIMM, arch=RESNET, image_size=64)
    assert len(data) == 6
    batch = next(iter(DataLoader(data, batch_size=6, collate_fn=collate)))
    assert batch["x"].shape == (6, 3, 64, 64) and batch["x"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1], "numbers are ordered by value: 2 before 10"
    about = TIMM.preprocessing(RESNET)
    colour = (torch.tensor([80, 90, 7]) / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    expected = colour[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(batch["x"][5], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the images in")
@pytest.mark.parametrize("size", [(500, 375), (301, 333), (90, 64), (224, 224)])
def test_image_preprocessing_equals_timms(tmp_path, size):
    """Resize, crop and normalise as timm's own evaluation transform does, on a photograph-like image."""
    from timm.data import create_transform

    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    (tmp_path / "flat").mkdir()
    image.save(tmp_path / "flat" / "a.png")
    about = TIMM.preprocessing(RESNET)
    ours = load_data(tmp_path / "flat", adapter=TIMM, arch=RESNET)[0]
    assert "labels" not in ours
    theirs = create_transform(
        about["size"], mean=about["mean"], std=about["std"], crop_pct=about["crop_pct"],
        interpolation=about["interpolation"],
    )(image)  # fmt: skip
    assert ours["x"].shape == theirs.shape
    torch.testing.assert_close(ours["x"], theirs, rtol=0, atol=1e-5)


def test_text_has_no_image_size(tmp_path):
    with pytest.raises(MergeidError, match="transformers/bert takes no images; leave out --image-size"):
        load_data({"input_ids": [[1, 2]]}, adapter=HF, arch=MASKED, image_size=32)


@pytest.mark.filterwarnings("ignore:the 2 class sub-folders")
def test_grey_images(image_folder):
    data = load_data(image_folder, adapter=TIMM, arch=GREY, image_size=32)
    assert data[0]["x"].shape == (1, 32, 32)


def test_small_images_are_enlarged_with_a_warning(image_folder):
    """80 x 60 pixels, where a ResNet takes 224: the model may have another size, which a config can say."""
    with pytest.warns(MergeidWarning, match=r"\(80x60\) are enlarged to 224x224"):
        load_data(image_folder, adapter=TIMM, arch=Architecture("timm", "resnet18", {}))
    said = {"pretrained_cfg": {"input_size": (3, 64, 64)}}
    data = load_data(image_folder, adapter=TIMM, arch=Architecture("timm", "resnet18", said))
    about = TIMM.preprocessing(Architecture("timm", "resnet18", said))
    assert data[0]["x"].shape == (3, 64, 64) and about["mean"] == TIMM.preprocessing(RESNET)["mean"]


@pytest.mark.filterwarnings("ignore:the images in")
def test_image_folder_by_the_models_label_names(image_folder):
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8,
              "id2label": {"0": "10", "1": "2"}, "label2id": {"10": 0, "2": 1}}  # fmt: skip
    arch = HF.recognise({}, config, {})
    data = load_data(image_folder, adapter=HF, arch=arch)
    assert data[0]["pixel_values"].shape == (3, 32, 32)
    assert [int(data[i]["labels"]) for i in range(6)] == [1, 1, 1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:the images in")
def test_image_folder_by_label_names_as_timm_writes_them(image_folder, tmp_path):
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_vit", num_classes=3)
    save_for_hf(model, tmp_path / "m", model_config={"label_names": ["10", "7", "2"]})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    arch = TIMM.recognise({}, config, {})
    data = load_data(image_folder, adapter=TIMM, arch=arch)
    assert [int(data[i]["labels"]) for i in range(6)] == [2, 2, 2, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:the images in")
def test_classes_that_are_numbered_by_their_order_are_said(image_folder):
    """Fewer folders than classes may well be called by the numbers of these: as timm numbers them, and said."""
    many = Architecture("timm", "resnet18", {"num_classes": 11})
    with pytest.warns(MergeidWarning, match=r"\('2' is class 0, '10' is class 1\), because the model has 11"):
        data = load_data(image_folder, adapter=TIMM, arch=many)
    assert [int(data[i]["labels"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8,
              "id2label": {"0": "two", "1": "10"}}  # fmt: skip
    with pytest.warns(MergeidWarning, match="because the model has no class named '2'; where labels count"):
        load_data(image_folder, adapter=HF, arch=HF.recognise({}, config, {}))


@pytest.mark.filterwarnings("ignore:the images in", "ignore:the 2 class sub-folders")
def test_image_folder_misfits(image_folder, tmp_path):
    with pytest.raises(MergeidError, match=r"2 class sub-folders \('2', '10', …\), but the model has 1"):
        load_data(image_folder, adapter=TIMM, arch=Architecture("timm", "resnet18", {"num_classes": 1}))
    (tmp_path / "none").mkdir()
    with pytest.raises(MergeidError, match="contains no images"):
        load_data(tmp_path / "none", adapter=TIMM, arch=RESNET)
    (image_folder / "2" / "0.png").write_bytes(b"not an image")
    with pytest.raises(MergeidError, match=r"0\.png cannot be read as an image"):
        load_data(image_folder, adapter=TIMM, arch=RESNET)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize(("inputs", "labels"), [("x", "labels"), ("images", "y"), ("inputs", "targets")])
def test_array_files(tmp_path, kind, inputs, labels):
    x = torch.randn(7, 3, 64, 64)
    y = torch.arange(7) % 4
    path = tmp_path / f"data.{kind}"
    if kind == "npz":
        np.savez(path, **{inputs: x.numpy(), labels: y.numpy()})
    else:
        save_file({inputs: x, labels: y}, path)
    data = load_data(path, adapter=TIMM, arch=RESNET)
    batch = collate([data[i] for i in range(7)])
    assert torch.equal(batch["x"], x) and torch.equal(batch["labels"], y)


def test_array_layouts():
    """uint8 is scaled and normalised; channels last and missing channels are put in place; float64 becomes float32."""
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    data = load_data({"x": pixels, "labels": torch.zeros(3, 1)}, adapter=TIMM, arch=GREY)
    mean, std = (TIMM.preprocessing(GREY)[k][0] for k in ("mean", "std"))
    torch.testing.assert_close(data[1]["x"], (pixels[1:2] / 255 - mean) / std)
    assert data[0]["labels"].shape == () and data[0]["labels"].dtype == torch.int64
    last = torch.randn(3, 32, 40, 3, dtype=torch.float64)
    item = load_data({"x": last}, adapter=TIMM, arch=RESNET)[2]
    assert item["x"].dtype == torch.float32 and torch.equal(item["x"], last[2].permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("arrays", "arch", "message"),
    [
        ({"x": torch.zeros(2, 1, 64, 64)}, RESNET, r"takes images \[batch, 3, .*shape \[2, 1, 64, 64\]"),
        ({"x": torch.zeros(2, 3, 64, 64)}, VIT, r"takes images \[batch, 3, 224, 224\]"),
        ({"x": torch.zeros(2, 3, 64, 64), "y": torch.tensor([0, 4])}, RESNET, "label 4 .* 4 classes"),
        ({"x": torch.zeros(9, 3, 64, 64), "y": torch.tensor([0] * 8 + [-1])}, RESNET, "label -1 .* 4 classes"),
        ({"x": torch.zeros(2, 3, 64, 64), "y": torch.tensor([0, 1, 2])}, RESNET, r"lengths \(x 2, labels 3\)"),
        ({"x": torch.zeros(2, 3, 64, 64), "y": torch.tensor([0.5, 1])}, RESNET, "fractional, NaN or infinite labels"),
        ({"weights": torch.zeros(2)}, RESNET, "has no inputs: it holds weights; expected one of x"),
        ({"x": torch.zeros(0, 3, 64, 64)}, RESNET, "is empty"),
        ({"input_ids": torch.full((2, 5), 30522)}, MASKED, "token id 30522 .* vocabulary of 30522"),
        ({"input_ids": torch.zeros(2, 513, dtype=torch.long)}, MASKED, "513 tokens.* has 512 positions"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, MASKED, "token ids as integers"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(arrays, arch, message, tmp_path):
    adapter = TIMM if arch.adapter == "timm" else HF
    save_file(arrays, tmp_path / "bad.safetensors")
    with pytest.raises(MergeidError, match=message) as caught:
        load_data(tmp_path / "bad.safetensors", adapter=adapter, arch=arch)
    assert "bad.safetensors" in str(caught.value), "the message names the file"


def test_broken_array_files(tmp_path):
    for name in ("a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(MergeidError, match="cannot be read as"):
            load_data(tmp_path / name, adapter=TIMM, arch=RESNET)


def test_not_found_and_wrong_kinds(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    for spec in ("./nothing", "/no/such/file", "gone.npz", str(tmp_path / "gone")):
        with pytest.raises(MergeidError, match="does not exist"):
            load_data(spec, adapter=TIMM, arch=RESNET)
    with pytest.raises(MergeidError, match="needs the package 'datasets'"):
        load_data("org/digits", adapter=TIMM, arch=RESNET)
    with pytest.raises(MergeidError, match="expected an image folder"):
        (tmp_path / "a.txt").write_text("hello")
        load_data(tmp_path / "a.txt", adapter=TIMM, arch=RESNET)
    with pytest.raises(MergeidError, match="contains no text files"):
        load_data(_empty(tmp_path), adapter=HF, arch=MASKED)
    with pytest.raises(MergeidError, match="at least 1"):
        load_data(tmp_path, adapter=TIMM, arch=RESNET, limit=0)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir(exist_ok=True)
    return folder / "empty"


def test_objects():
    """Torch datasets, lists, pairs and iterables of examples all give the same items."""
    x, y = torch.randn(5, 3, 64, 64), torch.arange(5) % 4
    forms = [
        TensorDataset(x, y),
        [{"image": a, "label": b} for a, b in zip(x, y, strict=True)],
        [(a, int(b)) for a, b in zip(x, y, strict=True)],
        (x, y),
        {"x": x, "y": y},
        ({"x": a, "labels": b} for a, b in zip(x, y, strict=True)),
    ]
    for form in forms:
        data = load_data(form, adapter=TIMM, arch=RESNET)
        batch = collate([data[i] for i in range(len(data))])
        assert torch.equal(batch["x"], x) and torch.equal(batch["labels"], y)
    assert "labels" not in load_data(x, adapter=TIMM, arch=RESNET)[0]
    with pytest.raises(MergeidError, match="is a int"):
        load_data(3, adapter=TIMM, arch=RESNET)


def test_module_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data_module.py").write_text(
        "import torch\ndef digits():\n    return [{'x': torch.zeros(3, 64, 64), 'labels': 1}] * 3\nnumber = 3\n"
    )
    data = load_data("my_data_module:digits", adapter=TIMM, arch=RESNET)
    assert len(data) == 3 and int(data[2]["labels"]) == 1
    assert str(tmp_path) not in sys.path
    with pytest.raises(MergeidError, match="has no function 'number'"):
        load_data("my_data_module:number", adapter=TIMM, arch=RESNET)
    with pytest.raises(MergeidError, match="'no_such_module' cannot be imported"):
        load_data("no_such_module:f", adapter=TIMM, arch=RESNET)


def test_limit_is_a_seeded_draw():
    x = torch.arange(50.0)[:, None, None, None].expand(50, 3, 64, 64)
    draws = [
        [float(d[i]["x"][0, 0, 0]) for i in range(len(d))]
        for seed in (0, 0, 1)
        for d in [load_data({"x": x}, adapter=TIMM, arch=RESNET, limit=9, seed=seed)]
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 9 and max(draws[0]) > 9
    assert len(load_data({"x": x}, adapter=TIMM, arch=RESNET, limit=99)) == 50


def test_hugging_face_datasets(monkeypatch):
    """The optional library is asked for the split that was named, else for validation, test, train in this order."""
    picture = Image.new("RGB", (20, 20), (255, 0, 0))
    rows = {"train": [{"image": picture, "label": 3}] * 4, "test": [{"image": picture, "label": 2}] * 2}
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split=None: rows if split is None else rows[split]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = load_data("org/name", adapter=TIMM, arch=RESNET)
    assert len(data) == 2 and int(data[0]["labels"]) == 2 and data[0]["x"].shape == (3, 224, 224)
    assert len(load_data("org/name@train", adapter=TIMM, arch=RESNET)) == 4
    with pytest.raises(MergeidError, match="cannot be loaded"):
        load_data("org/name@nosplit", adapter=TIMM, arch=RESNET)


def test_collate_misfits():
    with pytest.raises(MergeidError, match="different shapes"):
        collate([Item(x=torch.zeros(3, 2, 2)), Item(x=torch.zeros(3, 4, 4))])
    with pytest.raises(MergeidError, match="only some of the examples have 'labels'"):
        collate([Item(x=torch.zeros(1), labels=1), Item(x=torch.zeros(1))])
    with pytest.raises(MergeidError, match="no examples"):
        collate([])
    item = Item(input_ids=torch.tensor([5, 6]), attention_mask=torch.tensor([1, 1]))
    item.pad_id = 9
    batch = collate([item, Item(input_ids=torch.tensor([7]), attention_mask=torch.tensor([1]))])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_live_modules_of_no_known_library():
    """Without preprocessing facts a lone input goes by position, and keys of a dict are the module's own keywords."""

    class Plain:
        name = "torch"

        def preprocessing(self, arch: Architecture) -> dict[str, object]:
            return {}

    x, y = torch.randn(4, 7), torch.arange(4)
    arch = Architecture("torch", "Net")
    for form in (x, (x, y), TensorDataset(x, y), {"x": x, "y": y}):
        item = load_data(form, adapter=Plain(), arch=arch)[3]
        assert torch.equal(item["arg0"], x[3]) and item.get("labels", 3) == 3
    item = load_data({"left": x, "right": x + 1}, adapter=Plain(), arch=arch)[1]
    assert torch.equal(item["right"], x[1] + 1)


def test_adapters_without_a_check_of_their_own():
    """A third party's adapter gets the shape and label checks from its preprocessing facts alone."""

    class Simple:
        name = "simple"

        def preprocessing(self, arch: Architecture) -> dict[str, object]:
            return {"kind": "image", "size": (3, 8, 8), "classes": 2}

    arch = Architecture("simple", "net")
    assert load_data(torch.zeros(1, 3, 8, 8), adapter=Simple(), arch=arch)[0]["x"].shape == (3, 8, 8)
    with pytest.raises(MergeidError, match=r"simple/net takes images \[batch, 3, 8, 8\]"):
        load_data(torch.zeros(1, 2, 8, 8), adapter=Simple(), arch=arch)
    with pytest.raises(MergeidError, match="label 2 is out of range: simple/net has 2 classes"):
        load_data((torch.zeros(2, 3, 8, 8), torch.tensor([0, 2])), adapter=Simple(), arch=arch)
