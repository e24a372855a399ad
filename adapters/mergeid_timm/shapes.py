"""Parameter tables with free dimensions: what of a table depends on classes, input channels and image size.

A **template** is a tensor's shape in which a dimension may be a symbol, written as a short string:

- ``"N"``: the number of classes;
- ``"C*k"``: k times the number of input channels;
- ``"q:a,b,c,d"``: (a·S² + b·S + c) / d for image size S (position tables are quadratic in S);
- ``"*"``: depends on S in another way; the entry lists the values for the sizes that were tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Template = tuple["int | str", ...]
MAX_IMAGE_SIZE = 4096
MODULUS = 1 << 64


def counted(name: str) -> bool:
    """Whether a tensor is part of a table's identity (old files lack BatchNorm's step counters)."""
    return not name.endswith("num_batches_tracked")


def line_hash(name: str, shape: Iterable[int]) -> int:
    """64-bit hash of one tensor's name and shape. A table's digest is the sum over its tensors, so that tensors
    can be taken out again."""
    text = f"{name} {','.join(map(str, shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def digest(table: Mapping[str, Shape], without: Iterable[str] = ()) -> int:
    """Order-free digest of a table, the tensors named in `without` left out."""
    left_out = set(without)
    return sum(line_hash(n, s) for n, s in table.items() if counted(n) and n not in left_out) % MODULUS


def quadratic(text: str, size: int) -> int | None:
    """Value of ``"q:a,b,c,d"`` at an image size, None where it is not a whole number."""
    a, b, c, d = (int(v) for v in text[2:].split(","))
    value = a * size * size + b * size + c
    return value // d if value % d == 0 else None


@dataclass(frozen=True)
class Match:
    """One way to read a checkpoint's table as an architecture (None: no tensor tells)."""

    name: str
    options: Mapping[str, Any]
    unusual: int


@dataclass(frozen=True)
class Entry:
    """One architecture in the index.

    Attributes:
        name: timm's name.
        fixed: options that this table belongs to besides the default ones (``{"global_pool": "avg"}``).
        digest: digest of the table without the tensors of `templates` and `head`.
        templates: shape templates of the tensors that vary.
        head: tensors that are absent with ``num_classes=0``.
        input_size: default (C, H, W).
        sized: whether the constructor takes ``img_size``.
        samples: where a template has a ``"*"``: image size -> shapes of those tensors.
        small: image size of the smallest input that runs, None where the default size is needed.
    """

    name: str
    fixed: Mapping[str, Any]
    digest: int
    templates: Mapping[str, Template]
    head: tuple[str, ...]
    input_size: Shape
    sized: bool
    samples: Mapping[str, Mapping[str, Shape]] = field(default_factory=dict)
    small: int | None = None

    @property
    def variable(self) -> tuple[str, ...]:
        """Names of the tensors that the digest leaves out."""
        return tuple(sorted({*self.templates, *self.head}))

    @property
    def has_size(self) -> bool:
        """Whether some tensor's shape tells the image size."""
        return any(isinstance(d, str) and (d == "*" or d.startswith("q:")) for t in self.templates.values() for d in t)

    def match(self, table: Mapping[str, Shape]) -> Match | None:
        """Solve the templates against a table whose other tensors are known to agree."""
        present = [n for n in self.head if n in table]
        if present and len(present) != len(self.head):
            return None
        headless = bool(self.head) and not present
        values: dict[str, int] = {}
        equations: list[tuple[str, int]] = []
        sampled: dict[str, Shape] = {}
        for name, template in self.templates.items():
            if headless and name in self.head:
                continue
            shape = table.get(name)
            if shape is None or len(shape) != len(template):
                return None
            if not _unify(template, shape, values, equations):
                return None
            if "*" in template:
                sampled[name] = shape
        fits, size = self._image_size(equations, sampled)
        if not fits:
            return None
        options: dict[str, Any] = dict(self.fixed)
        if self.head:
            options["num_classes"] = 0 if headless else values.get("N", 0)
        channels = values.get("C")
        if channels is not None:
            options["in_chans"] = channels
        if size is not None:
            options["img_size"] = size
        odd_size, odd_channels = size is not None, channels not in (None, self.input_size[0])
        return Match(self.name, options, 4 * odd_size + 2 * odd_channels + bool(self.fixed))

    def _image_size(
        self, equations: Sequence[tuple[str, int]], sampled: Mapping[str, Shape]
    ) -> tuple[bool, int | None]:
        """Whether there is an image size that all tensors agree on, and which (None: the default one)."""

        def solves(size: int) -> bool:
            return all(quadratic(q, size) == v for q, v in equations)

        if sampled:
            for size, shapes in self.samples.items():
                number = None if size == "default" else int(size)
                side = self.input_size[-1] if number is None else number
                if all(shapes.get(n) == s for n, s in sampled.items()) and solves(side):
                    return True, number
            return False, None
        if not equations or solves(self.input_size[-1]):
            return True, None
        first, value = equations[0]
        for side in range(1, MAX_IMAGE_SIZE + 1):
            if quadratic(first, side) == value and solves(side):
                return True, side
        return False, None


def _unify(template: Template, shape: Shape, values: dict[str, int], equations: list[tuple[str, int]]) -> bool:
    for want, got in zip(template, shape, strict=True):
        if isinstance(want, int):
            if want != got:
                return False
        elif want == "N":
            if values.setdefault("N", got) != got:
                return False
        elif want.startswith("C*"):
            channels, rest = divmod(got, int(want[2:]))
            if rest or channels < 1 or values.setdefault("C", channels) != channels:
                return False
        elif want.startswith("q:"):
            equations.append((want, got))
    return True
