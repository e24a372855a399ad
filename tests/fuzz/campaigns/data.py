"""Data for ``--data``: records, text, images, arrays, functions."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import odd
from ..case import Case, campaign
from ..files import join, safetensors
from . import models

Made = tuple[str, bool]
"""Name of the data, and whether it is certainly good."""


@campaign("data", share=1.2, processes=120)
def data(rng: random.Random, folder: Path) -> Case:
    make, image = rng.choice(((records, False), (records, False), (plain, False), (arrays, False), (arrays, True),
                              (tensors, False), (images, True), (images, True), (functions, False)))  # fmt: skip
    pair = ["a.safetensors", "b.safetensors"] if image else ["a", "b"]
    models.put(folder, *pair)
    name, good = make(rng, folder)
    words = ["similarity", *pair, "--data", name, "--limit", "8", *(["--arch", "timm/test_resnet"] if image else [])]
    if image:
        words += ["--layers", "fc"]
    elif rng.random() < 0.3:
        words = ["barrier", *pair, "--data", name, "--limit", "8", "--points", "2", "--match", "never"]
    labelled = words[0] != "barrier"
    return Case(words, codes=frozenset({0}) if good and labelled else frozenset({0, 1, 2}))


def records(rng: random.Random, folder: Path) -> Made:
    """jsonl and json."""
    rows: list[Any] = [{"text": "a b c d", "label": i % 3} for i in range(6)]
    good = rng.random() < 0.08
    if not good:
        rows = odd.damaged(rng, rows)
        if not isinstance(rows, list):
            rows = [rows]
        if rng.random() < 0.15:
            rows.insert(
                rng.randrange(len(rows) + 1), {"text": odd.text(rng) * rng.choice((1, 1, 500)), "label": odd.value(rng)}
            )
    if rng.random() < 0.2:
        whole: Any = rows if rng.random() < 0.7 else {"data": rows}
        (folder / "d.json").write_bytes(odd.written(rng, whole, 0.0 if good else 0.3))
        return "d.json", good
    lines = [odd.written(rng, row, 0.0 if good else 0.07) for row in rows]
    if not good and rng.random() < 0.15:
        lines.insert(
            rng.randrange(len(lines) + 1),
            rng.choice((b"", b" ", b"\x00", b"//", odd.deep(rng).encode(), b"null", b"1")),
        )
    raw = rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
    if rng.random() < 0.1:
        raw = b"\xef\xbb\xbf" + raw
    (folder / "d.jsonl").write_bytes(raw if good or rng.random() < 0.9 else odd.damaged_bytes(rng, raw))
    return "d.jsonl", good


def plain(rng: random.Random, folder: Path) -> Made:
    """Text files, and folders of them."""
    good = rng.random() < 0.1
    text = (
        "a b c\n" * 5
        if good
        else rng.choice((odd.text(rng), "\n" * 99, "a" * 100_000, "é\n" * 9, "\x00" * 50, "a b\r\nc d\r\n"))
    )
    raw = text.encode(
        rng.choice(("utf-8", "utf-8-sig")) if good else rng.choice(("utf-8", "utf-16", "latin-1", "utf-8-sig")),
        "replace",
    )
    if not good and rng.random() < 0.4:
        raw = odd.damaged_bytes(rng, raw)
    name = rng.choice(("d.txt", "d.md", "d", "d.csv", "d.xyz", "dir/x.txt"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    return ("dir" if "/" in name else name), good and not name.endswith("xyz")


def arrays(rng: random.Random, folder: Path) -> Made:
    """npz: shapes, dtypes, labels, members that are no arrays, bombs, damaged archives."""
    generator = np.random.default_rng(rng.randrange(2**32))
    pixels = rng.random() < 0.5
    x: Any = generator.random((6, 1, 64, 64)) if pixels else generator.integers(0, 40, (6, 10))
    y: Any = np.arange(6) % 3
    how = rng.randrange(12)
    if how == 1:
        x = _cast(rng, x)
    elif how == 2:
        y = _cast(rng, y)
    elif how == 3:
        y = rng.choice(
            (
                y - 1,
                y + 3,
                y * 0.5,
                y[:-1],
                y[:, None],
                np.eye(6)[:, :3],
                y > 0,
                np.array(["a"] * 6),
                np.float64("nan") * y,
                y * 1e30,
            )
        )
    elif how == 4:
        x = x.astype(np.float64)
        x.flat[rng.randrange(x.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e300, -1, 40, 2**31))
    elif how == 5:
        shape = rng.choice(
            (
                (6,),
                (6, 0),
                (0, 10),
                (),
                (6, 1, 1, 1),
                (6, 3, 64, 64),
                (6, 64, 64),
                (6, 64, 64, 1),
                (1, 1, 1, 1, 6),
                (6, 99),
            )
        )
        x = np.zeros(shape, x.dtype)
    elif how == 6:
        x = x * 0 + rng.choice((-1, 39, 40, 10**9))
    names = {
        rng.choice(("x", "input_ids", "images", "X", "inputs")) if how else "x": x,
        rng.choice(("y", "labels", "targets")): y,
    }
    if how == 7:
        names[odd.text(rng).replace("\x00", "") or "z"] = np.zeros(rng.choice((6, 7)))
    if how == 8:
        names.pop(rng.choice(list(names)))
    stream = io.BytesIO()
    if how == 9:
        np.savez(stream, x=np.array([{"a": 1}] * 6, dtype=object), y=y)
    elif how == 10:
        _members(rng, stream)
    else:
        try:
            np.savez(stream, **{k: v for k, v in names.items() if k != "file"})
        except (ValueError, UnicodeError):
            np.savez(stream, x=x, y=y)
    raw = stream.getvalue()
    (folder / "d.npz").write_bytes(odd.damaged_bytes(rng, raw) if how == 11 else raw)
    return "d.npz", False


def _cast(rng: random.Random, values: Any) -> Any:
    kind = rng.choice(
        (
            "f2",
            "f4",
            "f8",
            ">f4",
            ">i8",
            "u1",
            "u2",
            "u4",
            "u8",
            "i1",
            "i2",
            "?",
            "c8",
            "f16",
            "M8[s]",
            "S3",
            "U3",
            "V8",
        )
    )
    try:
        return values.astype(kind)
    except (TypeError, ValueError):
        return np.zeros(values.shape, kind)


def _members(rng: random.Random, stream: io.BytesIO) -> None:
    """An archive that NumPy would not write."""
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        shape = rng.choice(("(6, 1, 64, 64)", "(99999999999999,)", "(-1,)", "(6,)", "1", "()"))
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
        text = header.ljust(117) + "\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        for name in rng.sample(("x.npy", "y.npy", "x", "../x.npy", "x.npy/", "labels.npy"), 2):
            size = rng.choice((0, 8, 6 * 64 * 64 * 8, 50_000_000))
            packed.writestr(name, rng.choice((npy + bytes(size), b"", b"\x93NUMPY", rng.randbytes(99), npy)))


def tensors(rng: random.Random, folder: Path) -> Made:
    """safetensors with inputs and labels."""
    ids = np.random.default_rng(rng.randrange(2**32)).integers(0, 40, (6, 10))
    table = {
        "input_ids": ("I64", [6, 10], ids.astype("<i8").tobytes()),
        "labels": ("I64", [6], (np.arange(6) % 3).astype("<i8").tobytes()),
    }
    good = rng.random() < 0.1
    raw = safetensors(table)
    if not good:
        (length,) = struct.unpack("<Q", raw[:8])
        header = odd.damaged(rng, json.loads(raw[8 : 8 + length]))
        raw = join(header, raw[8 + length :], text=odd.written(rng, header, 0.1))
        if rng.random() < 0.2:
            raw = odd.damaged_bytes(rng, raw)
    (folder / "d.safetensors").write_bytes(raw)
    return "d.safetensors", good


def images(rng: random.Random, folder: Path) -> Made:
    """Image folders: modes, formats, frames, sizes, damaged files, bombs."""
    place = folder / "images"
    good = rng.random() < 0.15
    labelled = rng.random() < 0.6
    for i in range(4):
        inside = (
            place / rng.choice(("0", "1", "2") if good else ("0", "1", "2", "3", "²", "cat", "10", ".x"))
            if labelled
            else place
        )
        inside.mkdir(parents=True, exist_ok=True)
        kind = rng.choice(("png", "png", "jpg", "bmp", "gif", "tif", "webp", "ppm"))
        raw = _image(rng, kind) if good or rng.random() < 0.7 else _hostile(rng)
        (inside / f"{i}.{kind}").write_bytes(raw)
    return "images", good


def _image(rng: random.Random, kind: str) -> bytes:
    modes = {"jpg": ("L", "RGB", "CMYK"), "bmp": ("1", "L", "P", "RGB"), "gif": ("P", "L"), "webp": ("RGB", "RGBA"),
    "ppm": ("L", "RGB"),
             "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "tif": ("1", "L", "P", "RGB", "CMYK",
             "I;16")}[kind]  # fmt: skip
    mode = rng.choice(modes)
    size = rng.choice(((64, 64), (1, 1), (3, 200), (90, 70), (2, 4000), (64, 63)))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    stream = io.BytesIO()
    more: dict[str, Any] = (
        {"save_all": True, "append_images": [image] * 2}
        if kind in ("gif", "tif", "webp") and rng.random() < 0.3
        else {}
    )
    if kind in ("png", "gif") and mode == "P":
        more["transparency"] = 3
    image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()), **more)
    return stream.getvalue()


def _hostile(rng: random.Random) -> bytes:
    how = rng.randrange(6)
    if how < 3:
        return odd.damaged_bytes(rng, _image(rng, rng.choice(("png", "jpg", "gif", "tif", "webp", "bmp"))))
    if how == 3:
        sizes = ((50_000, 50_000), (0, 5), (2**31 - 1, 2), (10_000, 10_000), (1, 60_000), (13_000, 13_000))
        width, height = rng.choice(sizes)
        kind = rng.choice((0, 2, 6))
        header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
        rows = zlib.compress(bytes(rng.choice((99, 100_000))))
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    if how == 4:
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), rng.choice((0.5, np.nan, 1e30)), np.float32)).save(stream, "TIFF")
        return stream.getvalue()
    return rng.choice(
        (b"", b"\x00", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", rng.randbytes(300), b"BM" + bytes(60))
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


BODIES = (
    "raise {e}('boom\\nand more \\x1b[31m')", "return [{v}] * 6", "return {v}",
    "return torch.zeros({s}), torch.tensor([0, 1, 2] * 2)",
    "return dict(input_ids=torch.zeros({s}), labels=torch.arange(6) % 3)", "return (({v}, 1) for _ in range(6))",
    "return ({v} for _ in iter(int, 1))", "return D()", "return D", "return lambda: 1", "yield {v}",
    "return [{v}, {v}, 3]",
    "return [{{'input_ids': torch.arange(10), 'labels': {v}}}] * 6", "return [{{'text': {v}, 'label': 1}}] * 6",
    "return ['a b'] * 6",
    "return [{{'text': 'a b', 'label': {v}}}] * 6", "return f()", "import sys; sys.exit({v})",
    "return [({v}, {v})] * 6",
)  # fmt: skip
ERRORS = (
    "RuntimeError",
    "ValueError",
    "KeyError",
    "SystemExit",
    "MemoryError",
    "StopIteration",
    "OSError",
    "AssertionError",
    "Exception",
)
VALUES = ("None", "1", "'a'", "b'a'", "[]", "{{}}", "object()", "float('nan')", "10**30", "torch.zeros(3)",
"torch.arange(10)", "set()", "...",
          "torch.zeros(10, dtype=torch.complex64)", "'\\ud800'", "[1, [2]]", "1e400", "-1", "torch.tensor(3)",
          "range(3)")  # fmt: skip
ITEMS = (
    "return torch.arange(10), i % 3",
    "raise {e}(i)",
    "return None",
    "return {v}",
    "return {{'input_ids': torch.arange(10), i: 1}}",
)
LENGTHS = ("return 6", "return -1", "return {v}", "raise {e}(1)", "return 2**70")


def functions(rng: random.Random, folder: Path) -> Made:
    """``module:function``: modules that do not parse or raise, functions that return anything."""
    module = f"m{rng.randrange(2**62)}"

    def filled(text: str) -> str:
        shape = rng.choice(("6, 10, dtype=torch.long", "6", "0, 10", "6, 10", "7, 10, dtype=torch.long", "()"))
        return text.format(e=rng.choice(ERRORS), v=rng.choice(VALUES).replace("{{", "{").replace("}}", "}"), s=shape)

    code = f"import torch\nclass D:\n  def __len__(self): {filled(rng.choice(LENGTHS))}\n"
    code += f"  def __getitem__(self, i): {filled(rng.choice(ITEMS))}\ndef f(): {filled(rng.choice(BODIES))}\n"
    if rng.random() < 0.15:
        code = rng.choice(
            (
                f"raise {rng.choice(ERRORS)}(1)\n",
                "def f(:\n",
                "\x00",
                "f = 3\n",
                "import nothing_of_this_name\n",
                "",
                "é\n",
            )
        )
    (folder / f"{module}.py").write_text(code, encoding=rng.choice(("utf-8", "utf-8", "latin-1")), errors="replace")
    return f"{module}:{rng.choice(('f', 'f', 'f', 'f', 'g', '__name__'))}", False
