"""Write the pages that are made of what the repository holds: python docs/reference.py

`schemas.md` from the JSON schemas of mergeid's own files, `benchmarks.md` from the tables that the benchmarks keep.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"
TABLES = Path(__file__).parent.parent / "tests" / "bench" / "tables"
FILES = {
    "recipe": ("Recipe", "A merge recipe in mergekit's words; several documents in one file are stages."),
    "graph": ("Graph", "`mergeid graph MODEL --json FILE`. [Files](files.md) explains it with an example."),
    "plan": ("Plan", "`mergeid plan --json`, and inside the record of a merge."),
    "sketch": (
        "Sketch",
        "The metadata of what `mergeid sketch` writes; a value other than text is JSON inside a text.",
    ),
    "record": ("Record", "`mergeid.json` beside every output."),
    "barrier-points": ("Points of a curve", "What `mergeid barrier` keeps to go on with after it was stopped."),
}
LIBRARIES = (
    *("timm", "transformers", "torchvision", "diffusers", "segmentation_models_pytorch", "open_clip", "monai"),
    *("torch_geometric", "torchaudio", "sentence_transformers"),
)
OTHERS = {
    "any_size": (
        "Any size",
        "Random Llama-type models in bfloat16, B a scrambled copy of A with 10 % noise. `loop`: one product of every "
        "tensor on each of its axes, as a yardstick.",
    ),
    "fine_tunes": (
        "Two fine-tunes",
        "What it costs, beside the plain merge, to see that two models share their neurons; and where two neurons of B "
        "are swapped, which gives the same file.",
    ),
    "gpu": ("Every verb on a GPU", "The same work on a CPU and on an NVIDIA H200, and where the results differ."),
    "gpu_sizes": ("Sizes on a GPU", "On an NVIDIA H200. The plan is that of a pair of 1.2 billion parameters."),
    "matching": ("Matchers", "Seconds of CPU, and the share of a planted permutation that was found."),
    "mergekit_coverage": (
        "All that mergekit documents",
        "Every field, method, parameter and option of mergekit 0.1.5, as its own code lists them. How many recipes "
        "with it give the same in both tools, how many one of them refuses, and the largest difference.",
    ),
    "mergekit_moe_parity": (
        "Mixtures of experts beside mergekit-moe 0.1.5",
        "Largest difference between the two tools' tensors, as transformers loads them.",
    ),
    "mergekit_parity": ("Recipes beside mergekit 0.1.5", "Largest difference between the two tools' tensors."),
    "naive_parity": (
        "Methods beside their formulas",
        "Largest difference from naive implementations in float64, relative to the largest number of the result.",
    ),
    "peft_parity": (
        "Adapters beside PEFT 0.21",
        "`add_weighted_adapter`: largest difference of the updates. Its `linear` adds the factors separately.",
    ),
    "sentence_transformers_parity": (
        "Folders beside sentence-transformers 6.2",
        "`SentenceTransformer.merge`, two dense layers: largest difference of any tensor.",
    ),
    "what_pays": (
        "What pays when",
        "Fine-tunes of a small ViT on handwritten digits: accuracy on images that nothing was chosen on.",
    ),
    "adamerging": (
        "AdaMerging beside task arithmetic",
        "Eight tasks, each with its own inputs and head: accuracy on test images, the mean first.",
    ),
    "soups": (
        "Soups",
        "Eight fine-tunes of a trained ViT on Fashion-MNIST: accuracy on 5,000 images that nothing was chosen on.",
    ),
    "predict_cost": ("What a prediction costs", "Seconds, beside those of measuring the curve."),
}
WORDS = {
    "cpu_seconds": "CPU seconds",
    "anonymous_MiB": "memory (MiB)",
    "peak_mb": "memory (MB)",
    "predict_seconds": "seconds of predict",
    "barrier_seconds": "seconds of barrier",
    "right": "found",
}
"""How the benchmarks' columns are called on the page."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)])


# --- schemas ------------------------------------------------------------------------------------------------------


def schemas_page(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """One section per format, one table per object in it."""
    parts = [
        "# Schemas",
        "The fields of each of mergeid's own files. Unknown names are refused, types are exact, "
        "and numbers are finite. `mergeid.io.written.published()` returns the same as JSON schemas.",
    ]
    known: set[str] = set()
    for name, schema in schemas.items():
        title, said = FILES.get(name, (name.capitalize(), ""))
        parts += [f"## {title}", said]
        objects = {title: schema, **schema.get("$defs", {})}
        for label, each in objects.items():
            if each.get("properties") and label not in known:  # what several files hold is explained once
                known.add(label)
                shown = [] if label == title else [f"### {label.removesuffix('Entry')}"]
                parts += [*shown, _fields(each)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _fields(schema: Mapping[str, Any]) -> str:
    needed = set(schema.get("required", ()))
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in needed else f"`{field['default']}`" if field.get("default") else ""
        rows.append([f"`{name}`", _kind(field), default])
    return table(["field", "value", "default"], rows)


def _kind(field: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1].removesuffix("Entry")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{v}`" for v in field["enum"])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_kind(f) for f in field[several]))
    kind = field.get("type")
    if kind == "array":
        return f"list of {_kind(field['items'])}" if field.get("items") else "list"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"names with {_kind(values)}" if isinstance(values, Mapping) else "table"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "null": "nothing"}
    return words.get(str(kind), str(kind or "anything"))


# --- benchmarks ---------------------------------------------------------------------------------------------------


def benchmarks_page(folder: Path) -> str:
    """Every table that lies in the folder; those of the coverage together."""
    found = {path.stem: _read(path) for path in sorted(folder.glob("*.csv"))}
    parts = [
        "# Benchmarks",
        "Every table here is made from what the scripts under `tests/bench` have kept, by `python docs/reference.py`. "
        "Two shared CPU cores; ratios count, seconds are upper limits. [Measured](measured.md) says what they mean.",
        "## Coverage",
        "`python tests/bench/coverage.py LIBRARY`: every model with random weights. *Holds*: traced, verified twice "
        "(other seeds, other inputs), with at least one free space. *Free*: the share of the parameters on an axis "
        "that may be reordered.",
        _coverage({name: found.pop(name) for name in LIBRARIES if name in found}),
    ]
    for name, rows in found.items():
        title, said = OTHERS.get(name, (name.replace("_", " ").capitalize(), ""))
        if rows:
            columns = [c for c in rows[0] if any(row[c] for row in rows)]
            cells = [[_short(row[c]) for c in columns] for row in rows]
            named = [WORDS.get(c, c.replace("_", " ")) for c in columns]
            parts += [f"## {title}", said, table(named, cells)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _coverage(libraries: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    rows = []
    for name, models in libraries.items():
        built = [m for m in models if m["traced"] == "1"]
        hold = [m for m in built if m["verified"] == m["held_again"] == "1" and int(m["spaces"] or 0) > 0]
        shares = sorted(float(m["share"]) for m in hold)
        seconds = [float(m["seconds"]) for m in hold if m["seconds"]]
        rows.append(
            [
                name,
                f"{len(models):,}",
                f"{len(built):,}",
                f"{len(hold):,}",
                f"{statistics.median(shares):.2%}",
                f"{shares[len(shares) // 10]:.2%}",
                f"{statistics.median(seconds):.1f} s",
            ]
        )
    columns = [
        "library",
        "models",
        "traced",
        "hold",
        "free, median",
        "free, tenth percentile",
        "trace and solve, median",
    ]
    return table(columns, rows)


def _short(value: str) -> str:
    """Numbers with three digits."""
    try:
        return value if value.isdigit() else f"{float(value):.3g}"
    except ValueError:
        return value


def main() -> None:
    from mergeid.io.written import published

    (PAGES / "schemas.md").write_text(schemas_page(published()), encoding="utf-8")
    (PAGES / "benchmarks.md").write_text(benchmarks_page(TABLES), encoding="utf-8")


if __name__ == "__main__":
    main()
