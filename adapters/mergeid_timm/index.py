"""The shipped index of timm's parameter tables: from tensor names and shapes to architecture names.

``index.json.xz`` holds one `Entry` per architecture, ``tables.txt.xz`` all tables in full (read only to say which
architecture is nearest). Both are written by ``python -m mergeid_timm.build_index``.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergeid_timm.shapes import MODULUS, Entry, Match, Shape, Template, counted, line_hash

FOLDER = Path(__file__).parent
INDEX_FILE = FOLDER / "index.json.xz"
TABLES_FILE = FOLDER / "tables.txt.xz"
# What training wrappers put before every name: DataParallel, torch.compile, transformers' timm wrapper, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "timm_model.", "model.")
# Buffers that old timm versions stored and the present one computes.
COMPUTED = ("relative_position_index", "attn_mask", "attention_bias_idxs", "rel_pos_indices")


class Index:
    """All entries, found by the digest of what does not vary."""

    def __init__(self, version: str, entries: Iterable[Entry]) -> None:
        self.version = version
        self.by_name: dict[str, list[Entry]] = {}
        self._groups: dict[tuple[str, ...], dict[int, list[Entry]]] = {}
        for entry in entries:
            self.by_name.setdefault(entry.name, []).append(entry)
            group = self._groups.setdefault(entry.variable, {})
            group.setdefault(entry.digest, []).append(entry)

    def lookup(self, table: Mapping[str, Shape]) -> list[Match]:
        """All readings of a table as an architecture of the index, the most usual and plainest name first."""
        return self._lookup(table) or self._lookup({n: s for n, s in table.items() if not n.endswith(COMPUTED)})

    def _lookup(self, table: Mapping[str, Shape]) -> list[Match]:
        hashes = {n: line_hash(n, s) for n, s in table.items() if counted(n)}
        total = sum(hashes.values())
        found: list[Match] = []
        for variable, group in self._groups.items():
            rest = (total - sum(hashes.get(n, 0) for n in variable)) % MODULUS
            found += [m for e in group.get(rest, ()) if (m := e.match(table)) is not None]
        return sorted(found, key=lambda m: (m.unusual, len(m.name), m.name))

    def read_options(self, name: str, table: Mapping[str, Shape]) -> dict[str, Any] | None:
        """Options of the named architecture that make its table this one, None where it cannot be."""
        return next((dict(m.options) for m in self.lookup(table) if m.name == name), None)


def _template(dims: Iterable[Any]) -> Template:
    return tuple(d if isinstance(d, str) else int(d) for d in dims)


@cache
def load_index() -> Index:
    """The shipped index (about a tenth of a second, once)."""
    content = json.loads(lzma.decompress(INDEX_FILE.read_bytes()))
    entries = (
        Entry(
            name=e["name"],
            fixed=e.get("fixed", {}),
            digest=int(e["digest"], 16),
            templates={n: _template(t) for n, t in e["templates"].items()},
            head=tuple(e["head"]),
            input_size=tuple(e["input_size"]),
            sized=e["sized"],
            samples={size: {n: tuple(s) for n, s in shapes.items()} for size, shapes in e.get("samples", {}).items()},
            small=e.get("small"),
        )
        for e in content["entries"]
    )
    return Index(content["timm"], entries)


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name -> name without a wrapper's prefix, for wrappers that all names share."""
    found = {n: n for n in names}
    again = True
    while again and found:
        again = False
        for wrapper in WRAPPERS:
            if all(n.startswith(wrapper) and len(n) > len(wrapper) for n in found.values()):
                found = {k: n.removeprefix(wrapper) for k, n in found.items()}
                again = True
    return found


@cache
def _full_tables() -> dict[str, dict[str, Template]]:
    """All tables with free dimensions as strings: name -> tensor -> template."""
    tables: dict[str, dict[str, Template]] = {}
    current: dict[str, Template] = {}
    for line in lzma.decompress(TABLES_FILE.read_bytes()).decode().splitlines():
        if line.startswith("@"):
            current = tables.setdefault(line[1:], {})
            continue
        name, _, dims = line.partition(" ")
        current[name] = tuple(int(d) if d.isdigit() else d for d in dims.split(";") if d)
    return tables


def _agree(template: Template, shape: Shape) -> bool:
    return len(template) == len(shape) and all(
        isinstance(t, str) or t == s for t, s in zip(template, shape, strict=True)
    )


def _show(template: Template) -> str:
    words = [str(d) if isinstance(d, int) else {"N": "classes"}.get(d, "?") for d in template]
    return f"[{', '.join(words)}]"


def nearest(table: Mapping[str, Shape]) -> str | None:
    """The architecture that shares most tensors (name and shape) with a table."""
    shapes = {n: tuple(s) for n, s in table.items() if counted(n)}
    best, best_score = None, 0.0
    for name, full in _full_tables().items():
        same = sum(1 for n, t in full.items() if n in shapes and _agree(t, shapes[n]))
        score = same / (len(full) + len(shapes) - same)
        if score > best_score or (score == best_score and best is not None and len(name) < len(best)):
            best, best_score = name, score
    return best if best_score > 0.05 else None


def first_difference(name: str, table: Mapping[str, Shape]) -> str | None:
    """The first tensor in which a table is not that of the named architecture, in words; None where it is."""
    full = _full_tables().get(name)
    if full is None:
        return None
    shapes = {n: tuple(s) for n, s in table.items() if counted(n)}
    head = {n for e in load_index().by_name.get(name, ()) for n in e.head}
    for tensor, template in full.items():
        if tensor not in shapes:
            if tensor in head and not any(n in shapes for n in head):
                continue
            return f"tensor {tensor!r} {_show(template)} is missing"
        if not _agree(template, shapes[tensor]):
            return f"tensor {tensor!r} has shape {list(shapes[tensor])}, expected {_show(template)}"
    extra = next((n for n in shapes if n not in full), None)
    return None if extra is None else f"tensor {extra!r} {list(shapes[extra])} is not part of it"
