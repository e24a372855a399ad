"""Pickled checkpoints: damaged archives, tensors of odd kinds, code that must not run."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from ..files import Table, averaged

OUT = "o.safetensors"
CODE = (
    b"cos\nsystem\n(S'touch PWNED'\ntR.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch PWNED\x85R.",
    b"c__builtin__\neval\n(S'open(\"PWNED\",\"w\")'\ntR.",
    b"\x80\x02]q\x00h\x00a.", b"(lp0\n" * 2000, b"\x80\x02" + b"(" * 3000,
    b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x02X\xff\xff\xff\x7fa.", b".", b"\x80", b"I" + b"9" * 5000 + b"\n.", b"\x80\x02}X\x01\x00\x00\x00wK\x01s.",
)  # fmt: skip


@campaign("pickles", share=3, processes=150)
def pickles(rng: random.Random, folder: Path) -> Case:
    codes, check = frozenset({0, 1, 2}), None
    name = rng.choice(("x.bin", "x.pt", "x.pth", "x.ckpt"))
    how = rng.randrange(10)
    if how == 0:
        raw, tables = _good(rng)
        codes = frozenset({0})
        check = lambda place: averaged(place / OUT, [tables, tables], [0.5, 0.5])  # noqa: E731
    elif how < 4:
        raw = odd.damaged_bytes(rng, _kinds()[rng.choice(list(_kinds()))])
    elif how < 6:
        raw = _kinds()[rng.choice(list(_kinds()))]
    elif how < 8:
        raw = _repacked(rng)
    else:
        raw = rng.choice(CODE)
        if rng.random() < 0.4:
            raw = odd.damaged_bytes(rng, raw)
    (folder / name).write_bytes(raw)
    words = ["merge", name, name, "--match", "never", "--allow-pickle", "-o", OUT]
    if codes != {0} and rng.random() < 0.1:
        words.remove("--allow-pickle")
    return Case(words, (OUT, "mergeid.json"), codes, check)


def _good(rng: random.Random) -> tuple[bytes, Table]:
    import torch

    tensors = {f"w{i}": torch.tensor([rng.gauss(0, 1) for _ in range(6)]).reshape(2, 3) for i in range(2)}
    table: Table = {k: ("F32", [2, 3], v.numpy().tobytes()) for k, v in tensors.items()}
    wrap = rng.choice((None, None, "state_dict", "model"))
    saved: Any = tensors if wrap is None else {wrap: tensors, "epoch": 3}
    return _saved(saved, old=rng.random() < 0.3), table


def _saved(value: Any, *, old: bool = False) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


class Evil:
    """Would run a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


@functools.cache
def _kinds() -> dict[str, bytes]:
    """One pickle for each kind of content that a state dict may have and should not."""
    import collections

    import numpy as np
    import torch

    w = torch.arange(6.0).reshape(2, 3)
    loop: dict[str, Any] = {"w": w}
    loop["model"] = loop
    deep: Any = w
    for _ in range(200):
        deep = {"model": deep}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds: dict[str, Any] = {
            "sparse": {"w": torch.eye(3).to_sparse()},
            "csr": {"w": torch.eye(3).to_sparse_csr()},
            "meta": {"w": torch.zeros(3, device="meta")},
            "quantised": {"w": torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)},
            "complex": {"w": w.to(torch.complex64)},
            "conjugate": {"w": torch.conj(w.to(torch.complex64))},
            "bool": {"w": w > 2},
            "float8": {"w": w.to(torch.float8_e4m3fn)},
            "uint16": {"w": w.to(torch.uint16)},
            "expanded": {"w": torch.ones(1).expand(1 << 20)},
            "huge": {"w": torch.ones(1).expand(1 << 40)},
            "overlapping": {"w": torch.as_strided(w, (2, 2), (1, 1))},
            "shared": {"w": w, "v": w[0]},
            "transposed": {"w": w.T},
            "parameter": {"w": torch.nn.Parameter(w)},
            "grad": {"w": w.clone().requires_grad_()},
            "nan": {"w": w / 0},
            "empty": {},
            "list": [w, w],
            "tensor": w,
            "number": 3,
            "none": None,
            "text": "w",
            "keys": {1: w, ("a", 2): w, None: w, "w": w},
            "ordered": collections.OrderedDict(w=w),
            "nested": deep,
            "loop": loop,
            "names": {t: w for t in odd.TEXTS if t != "\ud800"},
            "array": {"w": np.ones(3)},
            "strings": {"w": "text", "v": w},
            "module": torch.nn.Linear(2, 2),
            "evil": {"w": Evil()},
            "evil in a list": [Evil(), w],
            "zero": {"w": torch.zeros(0), "v": torch.zeros(3, 0)},
            "scalar": {"w": torch.tensor(1.0)},
            "ends": {"w": torch.tensor([3.4e38, -3.4e38])},
        }
        return {name: _saved(value) for name, value in kinds.items()} | {
            "old": _saved({"w": w}, old=True),
            "plain": pickle.dumps({"w": [1, 2]}),
            "numpy": pickle.dumps({"w": np.ones(3)}),
            "evil plain": pickle.dumps(Evil()),
        }


def _repacked(rng: random.Random) -> bytes:
    """A good archive with a member damaged, renamed, missing, twice or packed."""
    stream = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(_saved({"w": _weights()})))
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as target,
    ):
        warnings.simplefilter("ignore")  # a name twice is meant
        chosen = rng.choice(source.namelist())
        how = rng.randrange(4)
        for name in source.namelist():
            content = source.read(name)
            if name == chosen and how == 0:
                continue
            if name == chosen and how == 1:
                content = odd.damaged_bytes(rng, content)
            at = rng.choice(("archive/x", "../../PWNED", "archive/data.pkl")) if name == chosen and how == 2 else name
            if name == chosen and how == 3:
                content = rng.choice((b"", content * 2, rng.choice(CODE)))
            target.writestr(at, content)
    return stream.getvalue()


def _weights() -> Any:
    import torch

    return torch.arange(6.0).reshape(2, 3)
