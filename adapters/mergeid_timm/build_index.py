"""Write the index of timm's parameter tables: ``python -m mergeid_timm.build_index [--workers N]``.

Every architecture is built a few times on the meta device (no memory, no download): as it is, without a head, with
other input channels, other image sizes and other pooling. What changes becomes a template (`mergeid_timm.shapes`),
what stays becomes a digest. Takes a fraction of an hour on two cores, and gives the same
bytes every time.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from math import lcm
from typing import Any

from mergeid_timm.index import INDEX_FILE, TABLES_FILE
from mergeid_timm.shapes import Shape, Template, counted, digest, quadratic

CLASSES = 1009  # a prime that is no layer's width
CHANNELS = (3, 5)
SAMPLED_SIZES = (*range(32, 513, 32), 576, 640, 768, 896, 1024)
SMALL_SIZES = (64, 96, 128, 160, 192, 224, 256)

Table = dict[str, Shape]


def build(name: str, options: Mapping[str, Any]) -> tuple[Any, Table] | None:
    """A model on the meta device and its table; None where its constructor refuses the options."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **options)
    except Exception:  # each architecture refuses in its own way; refusing is the answer here
        return None
    return model, {k: tuple(v.shape) for k, v in model.state_dict().items() if counted(k)}


def polynomial(sizes: list[int], values: list[int]) -> str | None:
    """``"q:a,b,c,d"`` through all points, None where no quadratic passes (Lagrange on three, checked on all)."""
    (x0, x1, x2), (y0, y1, y2) = sizes[:3], values[:3]
    first, second = Fraction(y1 - y0, x1 - x0), Fraction(y2 - y1, x2 - x1)
    a = (second - first) / (x2 - x0)
    b = first - a * (x0 + x1)
    c = y0 - a * x0 * x0 - b * x0
    d = lcm(a.denominator, b.denominator, c.denominator)
    text = f"q:{int(a * d)},{int(b * d)},{int(c * d)},{d}"
    return text if all(quadratic(text, s) == v for s, v in zip(sizes, values, strict=True)) else None


def sized_tables(name: str, base: Table, default: tuple[int, int], fixed: Mapping[str, Any]) -> dict[int, Table]:
    """Tables at other image sizes; empty where the constructor takes none or no tensor depends on it."""
    side = default[-1]
    tables = {side: base} if default[0] == side else {}
    for size in (2 * side, 3 * side, 4 * side, side // 2, 64):
        built = build(name, {"num_classes": CLASSES, "img_size": size, **fixed})
        if built is not None:
            tables[size] = built[1]
    if all(t == base for t in tables.values()):
        return {}
    return tables


def dimension(base: int, with_channels: int | None, by_size: dict[int, int]) -> int | str:
    """The template of one dimension from its values under the variations."""
    if base == CLASSES:
        return "N"
    if with_channels is not None and with_channels != base:
        k, rest = divmod(base, CHANNELS[0])
        if rest or k * CHANNELS[1] != with_channels:
            raise ValueError(f"dimension {base} becomes {with_channels} with {CHANNELS[1]} input channels")
        return f"C*{k}"
    if len(set(by_size.values()) | {base}) > 1:
        sizes = sorted(by_size)
        return (polynomial(sizes, [by_size[s] for s in sizes]) if len(sizes) >= 4 else None) or "*"
    return base


def entry_of(name: str, fixed: Mapping[str, Any], size: Shape) -> tuple[dict[str, Any], dict[str, Template]] | None:
    """One index entry and the full table with templates."""
    built = build(name, {"num_classes": CLASSES, **fixed})
    if built is None:
        return None
    base = built[1]
    bare = build(name, {"num_classes": 0, **fixed})
    head = [n for n in base if bare is not None and n not in bare[1]]
    channels = build(name, {"num_classes": CLASSES, "in_chans": CHANNELS[1], **fixed})
    other = channels[1] if channels is not None else {}
    sizes = sized_tables(name, base, (size[1], size[2]), fixed)
    sizes = {s: t for s, t in sizes.items() if t.keys() == base.keys()}
    full: dict[str, Template] = {}
    for n, shape in base.items():
        full[n] = tuple(
            dimension(d, other[n][i] if n in other else None, {s: t[n][i] for s, t in sizes.items()})
            for i, d in enumerate(shape)
        )
    templates = {n: t for n, t in full.items() if any(isinstance(d, str) for d in t)}
    entry: dict[str, Any] = {
        "name": name,
        "digest": f"{digest(base, {*templates, *head}):x}",
        "templates": templates,
        "head": head,
        "input_size": list(size),
        "sized": build(name, {"num_classes": CLASSES, "img_size": size[-1], **fixed}) is not None,
    }
    if fixed:
        entry["fixed"] = dict(fixed)
    starred = [n for n, t in templates.items() if "*" in t]
    if starred:
        samples = {"default": {n: base[n] for n in starred}}
        for s in sorted({*SAMPLED_SIZES, *sizes}):
            sample = build(name, {"num_classes": CLASSES, "img_size": s, **fixed})
            if sample is not None and sample[1].keys() == base.keys():
                samples[str(s)] = {n: sample[1][n] for n in starred}
        entry["samples"] = samples
    has_size = bool(starred) or any(isinstance(d, str) and d[0] == "q" for t in templates.values() for d in t)
    small = None if has_size else smallest_input(built[0], size)
    if small is not None:
        entry["small"] = small
    return entry, full


def smallest_input(model: Any, size: Shape) -> int | None:
    """Side of the smallest square input that runs, tried on the meta device."""
    import torch

    for side in SMALL_SIZES:
        if side >= size[-1]:
            return None
        try:
            with torch.no_grad():
                model.eval()(torch.empty(2, size[0], side, side, device="meta"))
        except Exception:  # too small in one of a thousand ways; the next size may do
            continue
        return side
    return None


def entries_of(name: str) -> tuple[list[dict[str, Any]], dict[str, Template]]:
    """All entries of one architecture (default and other pooling) and its full default table."""
    import timm
    import torch
    from timm.layers import weight_init

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Half of the time would go into random values, of which the meta device has none.
    vars(weight_init)["_trunc_normal_"] = lambda tensor, *_: tensor
    config = timm.get_pretrained_cfg(name)
    size = tuple(config.input_size) if config is not None else (3, 224, 224)
    first = entry_of(name, {}, size)
    if first is None:
        raise RuntimeError(f"timm cannot build {name}")
    default, full = first
    entries, seen = [default], {frozenset(full)}
    for pool in ("avg", "token"):
        built = build(name, {"num_classes": CLASSES, "global_pool": pool})
        if built is None or frozenset(built[1]) in seen:
            continue
        seen.add(frozenset(built[1]))
        variant = entry_of(name, {"global_pool": pool}, size)
        if variant is not None:
            entries.append(variant[0])
    return entries, full


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    start = time.time()
    names = timm.list_models()
    entries: list[dict[str, Any]] = []
    lines: list[str] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for name, (found, full) in zip(names, pool.map(entries_of, names, chunksize=4), strict=True):
            entries += found
            lines.append(f"@{name}")
            lines += [f"{n} {';'.join(map(str, t))}" for n, t in full.items()]
            if len(entries) % 100 < len(found):
                print(f"{name} ({time.time() - start:.0f} s)", flush=True)
    content = json.dumps({"timm": timm.__version__, "entries": entries}, separators=(",", ":"))
    INDEX_FILE.write_bytes(lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME))
    TABLES_FILE.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{len(names)} architectures, {len(entries)} tables of timm {timm.__version__} in "
        f"{time.time() - start:.0f} s: {INDEX_FILE.stat().st_size + TABLES_FILE.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
