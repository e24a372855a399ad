"""The data sets and their variants: images, snippets of Python sources to classify, characters to continue.

Images are scikit-learn's digits (8x8), 5,000 MNIST digits and Fashion-MNIST (both cut and averaged to 12x12). Text is
the Python standard library: `packages` and `modules` ask where 16 tokens come from, `code` and `prose` predict the next
character of its sources and of the pages of the manual that it ships (`pydoc_data`).
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tabular
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mergeid.plugins import Batch

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from pictures import fashion, mnist

IMAGES = ("fashion", "mnist", "digits")
SNIPPETS = ("packages", "modules")
CHARACTERS = ("code", "prose")
VARIANTS = ("all", "turned", "mixed", "low", "high", "lower", "upper")
"""`turned`: images rotated by a quarter, sequences reversed, columns of tables mirrored at their mean; `mixed`: every
second example turned; `low` and `high`: the lower and the upper 60 % of the classes (of the documents, where characters
are predicted); `lower` and `upper`: the same with every fifth example of the other classes."""
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml", "importlib", "http", "urllib")
MODULES = ("argparse", "_pydecimal", "typing", "tarfile", "inspect", "datetime", "subprocess", "pydoc")
LENGTH = 16
"""Tokens of a snippet, characters of a context."""
WORDS = 512
ALPHABET = 96
TEST = 4000
CALIBRATION = 512


@dataclass(frozen=True)
class Part:
    """Examples: inputs [N, …], labels int64 [N] or [N, LENGTH], and the class or document group int64 [N]."""

    x: Tensor
    labels: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor | slice) -> Part:
        return Part(self.x[index], self.labels[index], self.group[index])


class Examples(Dataset):
    """A part as mergeid takes data: ``{"arg0": input, "labels": labels}``."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Batch:
        return {"arg0": self.part.x[index], "labels": self.part.labels[index]}

    def batch(self) -> Batch:
        """All of it."""
        return {"arg0": self.part.x, "labels": self.part.labels}


@dataclass(frozen=True)
class Shape:
    """What a network has to take and give: `side` pixels (0: tokens or columns), `tokens` in the vocabulary, `classes`,
    `columns` of a table."""

    side: int
    tokens: int
    classes: int
    columns: int = 0


def shape(data: str) -> Shape:
    """Of a data set by name."""
    if data in IMAGES:
        return Shape(8 if data == "digits" else 12, 0, 10)
    if data in tabular.TABLES:
        columns, classes = tabular.size(data)
        return Shape(0, 0, classes, columns)
    return Shape(0, WORDS, len(PACKAGES)) if data in SNIPPETS else Shape(0, ALPHABET, ALPHABET)


def train(data: str, variant: str = "all") -> Part:
    """Training examples of a variant."""
    return _variant(_load(data)[0], variant, data)


def test(data: str, variants: tuple[str, str] = ("all", "all")) -> Part:
    """Up to `TEST` examples that no model was trained on, shuffled; of two different variants half each."""
    return _both(_load(data)[1], variants, data, TEST)


def calibration(data: str, variants: tuple[str, str] = ("all", "all"), count: int = CALIBRATION) -> Part:
    """Training inputs for matching and repair, of the tasks that the two models were trained on."""
    return _both(_load(data)[0], variants, data, CALIBRATION).at(slice(count))


def _both(part: Part, variants: tuple[str, str], data: str, count: int) -> Part:
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(7))
    if variants[0] == variants[1]:
        return _variant(part.at(order), variants[0], data).at(slice(count))
    halves = [_variant(part.at(order[i::2]), v, data).at(slice(count // 2)) for i, v in enumerate(sorted(variants))]
    x, labels, group = (torch.cat([getattr(h, n) for h in halves]) for n in ("x", "labels", "group"))
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(8))
    return Part(x, labels, group).at(mixed)


def _variant(part: Part, variant: str, data: str) -> Part:
    if variant == "turned":
        return _turned(part, data)
    if variant == "mixed":
        turned, odd = _turned(part, data), torch.arange(len(part)) % 2 == 1
        x, labels = part.x.clone(), part.labels.clone()
        x[odd], labels[odd] = turned.x[odd], turned.labels[odd]
        return Part(x, labels, part.group)
    groups = shape(data).classes if data in tabular.TABLES else 10 if data in IMAGES else 8
    some = torch.arange(len(part)) % 5 == 0
    low, high = part.group < 0.6 * groups, part.group >= 0.4 * groups
    chosen = {"all": part.group >= 0, "low": low, "high": high, "lower": low | some, "upper": high | some}[variant]
    return part.at(chosen)


def _turned(part: Part, data: str) -> Part:
    if data in IMAGES:
        return Part(part.x.rot90(1, (2, 3)), part.labels, part.group)
    if data in tabular.TABLES:
        return Part(2 * part.x.mean(0) - part.x, part.labels, part.group)
    if data in SNIPPETS:
        return Part(part.x.flip(1), part.labels, part.group)
    windows = torch.cat([part.x, part.labels[:, -1:]], 1).flip(1)
    return Part(windows[:, :-1], windows[:, 1:], part.group)


# -- the sources --------------------------------------------------------------------------------------------


@cache
def _load(data: str) -> tuple[Part, Part]:
    """All training and test examples."""
    if data == "fashion":
        parts = [_images(*_fashion(split), 12) for split in ("train", "t10k")]
        return parts[0].at(slice(6000)), parts[1]
    if data == "mnist":
        digits, labels = mnist()
        part = _images(digits.reshape(-1, 28, 28), labels, 12)
        return part.at(slice(4000)), part.at(slice(4000, None))
    if data == "digits":
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(x))
        part = _images(x[order].reshape(-1, 8, 8), labels[order], 8)
        return part.at(slice(797)), part.at(slice(797, None))
    if data in tabular.TABLES:
        trained, tested = (Part(x, labels, labels) for x, labels in tabular.split(data))
        return trained, tested
    return _snippets(data) if data in SNIPPETS else _characters(data)


def _images(x: np.ndarray, labels: np.ndarray, side: int) -> Part:
    """Standardised float32 [N, 1, side, side]."""
    pixels = torch.from_numpy(x).float()[:, None]
    if side == 12:
        pixels = torch.nn.functional.avg_pool2d(pixels[..., 2:26, 2:26], 2)
    classes = torch.from_numpy(labels).long()
    return Part((pixels - pixels[:4000].mean()) / pixels[:4000].std(), classes, classes)


def _fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = fashion(split)
    count = 12000 if split == "train" else 10000
    return pixels.reshape(-1, 28, 28)[:count], labels[:count]


def _files(name: str) -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = root / f"{name}.py"
    yield from [found] if found.exists() else sorted((root / name).rglob("*.py"))


def _source(name: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in _files(name))


def _snippets(data: str) -> tuple[Part, Part]:
    """`LENGTH` tokens (words and signs, hashed) and which package or module they come from; 700 for training and up to
    500 for testing of each, of all as many."""
    names = PACKAGES if data == "packages" else MODULES
    found = []
    for label, name in enumerate(names):
        words = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", _source(name))
        ids = torch.tensor([zlib.crc32(w.encode()) % WORDS for w in words])
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        found.append(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(label))])
    count = min(500, min(map(len, found)) - 700)
    parts = []
    for chosen in ([rows[150:850] for rows in found], [torch.cat([r[:150], r[850:]])[:count] for r in found]):
        labels = torch.arange(len(names)).repeat_interleave(len(chosen[0]))
        parts.append(Part(torch.cat(chosen), labels, labels))
    return parts[0], parts[1]


def _characters(data: str) -> tuple[Part, Part]:
    """Contexts of `LENGTH` characters and what follows each of them. Every tenth stretch is for testing."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    trained, tested = [], []
    for group, text in enumerate(_documents(data)):
        ids = _encoded(text)
        stretches = ids[: len(ids) // 500 * 500].view(-1, 500)
        held = torch.arange(len(stretches)) % 10 == 9
        for part, of, counts in ((trained, stretches[~held], (4000, 0)), (tested, stretches[held], (250, 750))):
            for count, generator in zip(counts, generators, strict=True):
                rows = torch.randint(len(of), (count,), generator=generator)
                starts = torch.randint(500 - LENGTH, (count, 1), generator=generator)
                windows = of[rows[:, None], starts + torch.arange(LENGTH + 1)]
                part.append(Part(windows[:, :-1], windows[:, 1:], torch.full((count,), group)))
    return _joined(trained), _joined(tested)


def _documents(data: str) -> Iterable[str]:
    if data == "code":
        return (_source(name) for name in PACKAGES)
    if importlib.util.find_spec("pydoc_data") is None:
        sys.exit("the text of the Python manual is missing (module pydoc_data.topics)")
    from pydoc_data.topics import topics

    texts = [topics[k] for k in sorted(topics)]
    return ("\n".join(texts[i::8]) for i in range(8))


def _encoded(text: str) -> Tensor:
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
    shifted = np.where(codes == 10, ALPHABET - 1, codes - 32)
    return torch.from_numpy(np.where((shifted >= 0) & (shifted < ALPHABET), shifted, ord("?") - 32))


def _joined(parts: list[Part]) -> Part:
    return Part(*(torch.cat([getattr(p, n) for p in parts]) for n in ("x", "labels", "group")))
