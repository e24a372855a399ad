"""Data that is damaged, hostile or odd: read right, or refused in one sentence that names it."""

from __future__ import annotations

import itertools
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mergeid_timm import TimmAdapter
from mergeid_transformers import TransformersAdapter
from PIL import Image

from mergeid.data import load_data
from mergeid.errors import MergeidError
from mergeid.plugins import Architecture

TIMM, HF = TimmAdapter(), TransformersAdapter()
pytestmark = pytest.mark.filterwarnings("ignore:the images in")
NET = Architecture("timm", "test_resnet", {"num_classes": 4})
GREY = Architecture("timm", "test_resnet", {"num_classes": 4, "in_chans": 1})
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, Path]:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": len(WORDS)}
    arch = HF.recognise({}, {**config, "hidden_size": 8, "num_attention_heads": 2, "num_labels": 3}, {})
    assert arch is not None
    return arch, folder


def refused(message: str, spec: object, arch: Architecture = NET, folder: Path | None = None) -> None:
    """One sentence of sane length, when the data is opened or when an example is read."""
    with pytest.raises(MergeidError, match=message) as caught:
        data = load_data(spec, adapter=TIMM if arch.adapter == "timm" else HF, arch=arch, folder=folder)
        for i in range(len(data)):
            data[i]
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2,.* cannot be read as JSON .RecursionError|line 2, is not JSON"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "line 2, cannot be read as JSON .*4300 digits"),
        (f'{{"text": "a", "label": {10**30}}}', "label of more than 63 bits"),
        ('{"text": "a", "label": "' + "x" * 9999 + '"}', "label 'xxx.*…"),
        ('{"text": "a", "label": NaN}', "label nan"),
        ('{"text": "a", "label": 0.5}', "label 0.5"),
        ('{"text": "a", "label": 7}', "label 7 .*3 classes"),
        ('{"text": null, "label": 1}', "record 2 has 'text' of the kind NoneType; expected text"),
        ('{"text": ["a"], "label": 1}', "record 2 has 'text' of the kind list"),
        ('{"label": 1}', "'text' in 1 of 2 records, and not in record 2"),
        ('{"text": "a"}', "'label' in 1 of 2 records, and not in record 2"),
        ("null", "line 2, must be an object"),
        ("\0", "line 2, is not JSON"),
    ],
)
def test_records_that_are_refused(bert, tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "label": 1}\n' + line + "\n")
    refused(message, path, *bert)


def test_records_that_are_read(bert, tmp_path):
    """A byte-order mark, CRLF, empty lines, a line separator inside a string, half of a surrogate pair, 1.0 for 1."""
    lines = ['{"text": "a\u2028b\x85c", "label": 1.0}', "", '{"text": "\\ud800", "label": 2}']
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = load_data(path, adapter=HF, arch=bert[0], folder=bert[1])
    assert [int(data[i]["labels"]) for i in range(len(data))] == [1, 2]
    assert data[0]["input_ids"].tolist() == [2, 5, 6, 7, 3] or 1 in data[0]["input_ids"].tolist()


def test_tokens_that_the_model_does_not_have(bert, tmp_path):
    """Also where the first examples have none."""
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "g"]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": 0}) + "\n" for t in [*"abcabc", "g"]))
    refused("example 6 of the data .* token id 11 is out of range.* vocabulary of 11", path, bert[0], tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(): raise RuntimeError('boom')", "the function 'f' fails .RuntimeError: boom"),
        ("def f(:", "module '{module}' fails on import .SyntaxError"),
        ("raise SystemExit(0)", "fails on import .SystemExit"),
        ("def f():\n import sys; sys.exit(0)", "the function 'f' fails .SystemExit"),
        ("def f(x): return x", "fails .TypeError: .*missing 1 required"),
        ("def f(): return [None] * 20", "'x' of the kind NoneType, which cannot become a tensor"),
        ("def f(): return 'images'", "is a str; expected a torch dataset"),
        ("def f(): return None", "is a NoneType; expected a torch dataset"),
        ("def f(): return []", "is empty"),
        (
            "import itertools, torch\ndef f(): return (torch.zeros(3, 1, 1) for _ in itertools.count())",
            "65,536 examples and has no length",
        ),
        (
            "class D:\n def __len__(self): return 9\n def __getitem__(self, i):\n  import torch\n"
            "  if i > 5: raise OSError('gone')\n  return torch.zeros(3, 64, 64), 1\ndef f(): return D()",
            "example 6 of the data .* cannot be read .OSError: gone",
        ),
        (
            "class D:\n def __len__(self): return -1\n def __getitem__(self, i): return 1\ndef f(): return D()",
            "cannot be",
        ),
        ("import torch\ndef f(): return torch.zeros(9, 3, 64, 64), torch.full((9,), 7)", "label 7 .* 4 classes"),
        ("import torch\ndef f(): return torch.full((9, 3, 64, 64), float('nan'))", "example 0 .* contains NaN"),
    ],
)
def test_functions_that_fail(tmp_path, monkeypatch, code, message):
    module = f"data_{zlib.crc32(code.encode())}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    refused(message.format(module=module), f"{module}:f")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes = bytes(99)) -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(50_000, 50_000), "claims so many pixels .*DecompressionBombError"),
        (png(0, 3), "cannot be read as an image"),
        (png(20, 20), "cannot be read as an image"),
        (png(20, 20)[:40], "cannot be read as an image"),
        (b"", "cannot be read as an image .unknown format"),
        (b"GIF89a" + bytes(7), "cannot be read as an image"),
    ],
)
def test_images_that_are_refused(tmp_path, content, message):
    (tmp_path / "b.png").write_bytes(content)
    refused(r"b\.png " + message, tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_images_of_every_mode(tmp_path, mode):
    """Those that a file can hold are read; uniformly white stays white."""
    image = Image.new("L", (9, 7), 255).convert("RGB").convert(mode) if mode != "PA" else Image.new("PA", (9, 7))
    try:
        image.save(tmp_path / "a.tif")
    except (OSError, KeyError):
        return  # the format has no such mode
    found = load_data(tmp_path, adapter=TIMM, arch=GREY)[0]["x"]
    about = TIMM.preprocessing(GREY)
    if mode not in ("PA", "HSV"):
        torch.testing.assert_close(
            found, torch.full_like(found, (1 - about["mean"][0]) / about["std"][0]), atol=0.02, rtol=0
        )


def test_sixteen_bit_images_keep_their_greys(tmp_path):
    """Pillow's own conversion makes everything above 255 white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    for name, values in (("a", ramp), ("b", (ramp // 257).astype(np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "i.png")
    deep, flat = (load_data(tmp_path / n, adapter=TIMM, arch=GREY)[0]["x"] for n in "ab")
    torch.testing.assert_close(deep, flat, atol=0.05, rtol=0)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a" / "i.tif")
    (tmp_path / "a" / "i.png").unlink()
    refused(r"i\.tif: a floating-point image", tmp_path / "a")


def test_elongated_images_do_not_fill_the_memory(tmp_path):
    Image.fromarray(np.arange(60_000, dtype=np.uint32).astype(np.uint8)[:, None]).save(tmp_path / "tall.png")
    assert load_data(tmp_path, adapter=TIMM, arch=NET)[0]["x"].shape[0] == 3


@pytest.mark.filterwarnings("ignore:the 3 class sub-folders")
def test_folders_named_by_odd_digits(tmp_path):
    for name in ("²", "10", "2"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    assert load_data(tmp_path, adapter=TIMM, arch=NET).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([object()])}, "cannot be read|array of Python objects"),
        ({"x": np.array(["a", "b"])}, "'x' as an array of text; expected numbers"),
        ({"x": np.zeros((2, 3, 64, 64), complex)}, "its numbers are complex; expected real ones"),
        ({"x": np.zeros((2, 3, 64, 64), np.float32), "y": np.array([2**63, 0], np.uint64)}, "2.63 and more"),
        ({"x": np.zeros((2, 3, 64, 64), np.float32), "y": np.array([np.nan, 0])}, "fractional, NaN or infinite labels"),
        ({"x": np.zeros((2, 3, 64, 64), np.float32), "y": np.array([1e30, 0])}, "label .* 4 classes"),
        ({"x": np.zeros((2, 3, 64, 64), np.float32), "y": np.zeros((2, 4))}, "one class number per image"),
        ({"x": np.full((6, 3, 64, 64), [[[[0]]]] * 5 + [[[[np.inf]]]])}, "example 5 .*NaN or infinite"),
        ({"x": np.zeros((2, 3, 0, 0), np.float32)}, "example 0 .* empty"),
        ({"x": np.full((2, 3, 64, 64), 256)}, "holds integers from 256 to 256; expected integers from 0 to 255"),
        ({"x": np.full((2, 3, 64, 64), -1)}, "holds integers from -1 to -1"),
        ({"x": np.ones((2, 3, 64, 64), bool)}, "holds truth values"),
        ({}, "no inputs"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    refused(message, tmp_path / "d.npz")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.int16, np.uint16])
def test_bytes_in_wider_integers_are_bytes(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64))
    found, expected = ({"x": pixels.astype(k)} for k in (kind, np.uint8))
    one, two = (load_data(arrays, adapter=TIMM, arch=NET)[1]["x"] for arrays in (found, expected))
    assert torch.equal(one, two)


def test_token_ids_have_the_dimensions_that_the_model_takes(bert, tmp_path):
    ids = np.full((4, 3, 5), 2)
    np.savez(tmp_path / "d.npz", input_ids=ids, labels=np.zeros(4, int))
    refused(r"takes token ids as integers \[batch, tokens\], .* \[4, 3, 5\]", tmp_path / "d.npz", *bert)
    config = {**bert[0].options["config"], "architectures": ["BertForMultipleChoice"]}
    choice = HF.recognise({}, config, {})
    assert load_data(tmp_path / "d.npz", adapter=HF, arch=choice)[0]["input_ids"].shape == (3, 5)
    np.savez(tmp_path / "d.npz", input_ids=ids[:, 0])
    refused(r"\[batch, choices, tokens\], .* \[4, 5\]", tmp_path / "d.npz", choice)


def test_arrays_of_other_formats_are_read(tmp_path):
    """The other byte order, and unsigned integers with which torch cannot calculate."""
    pixels = np.random.default_rng(0).random((3, 3, 64, 64))
    np.savez(tmp_path / "d.NPZ", x=pixels.astype(">f8"), y=np.array([0, 1, 2], np.uint16))
    (tmp_path / "d.NPZ.npz").rename(tmp_path / "d.NPZ")
    data = load_data(tmp_path / "d.NPZ", adapter=TIMM, arch=NET)
    torch.testing.assert_close(data[1]["x"], torch.from_numpy(pixels[1]).float())
    assert data.labels.tolist() == [0, 1, 2]


def test_packed_zeros_of_many_gigabytes(tmp_path, monkeypatch):
    """Nothing is unpacked: the sizes in the archive's own list are enough."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.npy", bytes(1000))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 1000), struct.pack("<I", 0xFFFFFFF0)))
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 16)
    refused(r"bomb\.npz unpacks to 4 GB, more than half of this machine's memory", path)


@pytest.mark.parametrize("spec", ["x" * 5000, "a/" * 3000, "~nobody_of_this_name/x", "\n", "", " ", "a:b:c", "..:f"])
def test_names_that_are_none(spec):
    with pytest.raises(MergeidError, match="the data "):
        load_data(spec, adapter=TIMM, arch=NET)


def test_iterables_with_an_end_are_read():
    rows = itertools.islice(itertools.repeat((torch.zeros(3, 64, 64), 1)), 7)
    assert len(load_data(rows, adapter=TIMM, arch=NET)) == 7


@pytest.mark.parametrize(
    "stated",
    [
        {"size": "large"},
        {"size": {"height": "x", "width": 3}},
        {"image_mean": 3},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": [0, 0, 0]},
        {"image_mean": [1, 2]},
        {"resample": [3]},
        {"crop_size": -5},
    ],
)
def test_preprocessor_files_of_any_content(stated, tmp_path):
    """Read or refused, by the file's own sentence or at the first image."""
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "patch_size": 8}
    arch = HF.recognise({}, config, {})
    assert arch is not None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    try:
        found = load_data(tmp_path / "images", adapter=HF, arch=arch, folder=tmp_path)[0]["pixel_values"]
    except MergeidError as error:
        assert len(str(error)) < 600
    else:
        assert found.shape == (3, 32, 32) and bool(found.isfinite().all())


def test_tables_whose_first_line_names_the_text(bert: tuple[Architecture, Path], tmp_path: Path) -> None:
    """The first line, and the labels, were read as text."""
    arch, folder = bert
    table, same = tmp_path / "d.csv", tmp_path / "d.jsonl"
    table.write_text('label,text\n2,"a, b"\n\n0,c\n', encoding="utf-8-sig")
    same.write_text('{"label": 2, "text": "a, b"}\n{"label": 0, "text": "c"}\n')
    data = load_data(table, adapter=HF, arch=arch, folder=folder)
    wanted = load_data(same, adapter=HF, arch=arch, folder=folder)
    assert len(data) == len(wanted) == 2
    for one, other in zip(data, wanted, strict=True):  # type: ignore[call-overload]
        assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    (tmp_path / "d.tsv").write_text("text\tlabel\na b\t1\n")
    assert int(load_data(tmp_path / "d.tsv", adapter=HF, arch=arch, folder=folder)[0]["labels"]) == 1
    (tmp_path / "lines.csv").write_text("a b\nc, d\n")
    assert len(load_data(tmp_path / "lines.csv", adapter=HF, arch=arch, folder=folder)) == 2
    for text, message in (
        ("text,label\na,b,1\n", "line 2, has 3 columns where the first line has 2"),
        ("text,label\na,x\n", "has the label 'x', which the model does not know; expected 0 to 2"),
        ('text,label\n"' + "a" * 200_000, "line 2, cannot be read"),
    ):
        table.write_text(text)
        refused(message, table, arch, folder)


def test_what_is_neither_file_nor_folder(bert: tuple[Architecture, Path], tmp_path: Path) -> None:
    """They were taken for names of datasets on the hub."""
    arch, folder = bert
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused("pipe is a named pipe; expected a file or folder of examples", tmp_path / "pipe", arch, folder)
    refused("cannot read .*loop: .*symbolic links", tmp_path / "loop", arch, folder)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 0.5])
def test_labels_that_are_no_numbers_of_classes(bert: tuple[Architecture, Path], tmp_path: Path, bad: float) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.ones((2, 3), int), labels=np.array([0.0, bad]))
    refused("fractional, NaN or infinite labels; expected class numbers", tmp_path / "d.npz", *bert)


@pytest.mark.parametrize(("values", "kind"), [(["a"], "text"), (np.array(["2026-01-01"], "M8[D]"), "dates")])
def test_arrays_of_no_numbers(bert: tuple[Architecture, Path], tmp_path: Path, values: object, kind: str) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.array(values))
    refused(f"has 'input_ids' as an array of {kind}; expected numbers$", tmp_path / "d.npz", *bert)


@pytest.mark.parametrize("seed", [2**62, 2**63 - 1])
def test_masks_for_every_seed_that_is_allowed(bert: tuple[Architecture, Path], tmp_path: Path, seed: int) -> None:
    """Beyond some 2^43, examples could not be read (overflow): times in nanoseconds are such seeds."""
    masked = HF.recognise({}, {**bert[0].options["config"], "architectures": ["BertForMaskedLM"]}, {})
    assert masked is not None
    (tmp_path / "d.txt").write_text("a b c d e f\n" * 3)
    data = load_data(tmp_path / "d.txt", adapter=HF, arch=masked, folder=bert[1], seed=seed)
    assert all(int((data[i]["labels"] != -100).sum()) == 1 for i in range(3))
