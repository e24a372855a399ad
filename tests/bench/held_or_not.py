"""The same pair held in memory, and never whole in memory: `python tests/bench/held_or_not.py --work FOLDER`.

A Llama of 0.1 billion parameters, its scrambled copy with 10 % noise, and 64 texts of 128 tokens. `plan`, `merge` (as
it is and solved) and `predict` run in both ways, in processes of their own; the table holds what differs: decisions,
the largest gap between merged tensors (relative to a tensor's largest entry), and between predictions. Rows that the
table has already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from any_size import SHAPES, add_noise, write_model, write_texts
from measure import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TABLE = Path(__file__).parent / "tables" / "held_or_not.csv"
VERB = """
import sys
from mergeid.models import load
load.LARGEST_HELD = int(sys.argv.pop(1))
from mergeid.commands.cli import main
sys.exit(main())
"""
SOLVED = "merge --match always --repair solve"
MOST = {"bfloat16": 1e-3, "float32": 1e-5}
FIELDS = ("model", "format", "what", "value", "asked", "cpu_held", "cpu_not", "mib_held", "mib_not")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="0.1B")
    parser.add_argument("--format", nargs="+", choices=MOST, default=list(MOST))
    parser.add_argument("--verb", nargs="+", choices=("plan", "merge", "predict", "solve"))
    parser.add_argument("--table", type=Path, default=TABLE)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = list(csv.DictReader(given.table.open())) if given.table.exists() else []
    for kind in given.format:
        work = given.work / f"{given.size}-{kind}"
        a, b = written(work, given.size, getattr(torch, kind))
        for name in given.verb or ("plan", "merge", "predict", "solve"):
            verb = SOLVED if name == "solve" else name
            known = (f"{verb}, ", given.size, kind)
            if any((r["what"].startswith(known[0]), r["model"], r["format"]) == (True, *known[1:]) for r in rows):
                continue
            for row in compared(work, a, b, verb, MOST[kind]):
                rows.append({"model": given.size, "format": kind, **row})
                print(*rows[-1].values(), flush=True)
            with given.table.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        shutil.rmtree(work)
    wrong = [r for r in rows if not float(r["value"]) <= float(r["asked"])]
    print(f"{len(rows)} figures, {len(wrong)} beyond what is asked")
    return int(bool(wrong))


def written(work: Path, size: str, kind: torch.dtype) -> tuple[Path, Path]:
    a, b = work / "a", work / "b"
    if not b.exists():
        write_model(a, size)
        run([sys.executable, "-m", "mergeid", "scramble", str(a), "-o", str(b), "--seed", "7"], log=work / "log")
        add_noise(b)
        for file in (*a.glob("*.safetensors"), *b.glob("*.safetensors")):
            state = {k: v.to(kind) for k, v in load_file(file).items()}
            save_file(state, file, metadata={"format": "pt"})
        for folder in (a, b):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "dtype": str(kind).removeprefix("torch.")}))
        write_texts(work / "texts.safetensors", SHAPES[size][-1])
    return a, b


def compared(work: Path, a: Path, b: Path, verb: str, most: float) -> Iterator[dict[str, Any]]:
    """One verb in both ways: what differs."""
    said, used, outputs, merges = [], [], [], verb.startswith("merge")
    for how, limit in (("held", 10**12), ("not", 0)):
        out = work / f"out-{how}"
        shutil.rmtree(out, ignore_errors=True)
        told = out / "mergeid.json" if merges else work / f"{verb}-{how}.json"
        options = ["-o", out, "--force", *(verb.split()[1:] or ["--repair", "none"])]
        given = [a, b, "--data", work / "texts.safetensors", *(options if merges else ["-o", told])]
        command = [sys.executable, "-c", VERB, limit, verb.split()[0], *given]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        used.append(run([str(x) for x in command], environment=environment, log=work / f"{verb}-{how}.log"))
        said.append(json.loads(told.read_text()))
        outputs.append(out)
    took = {
        f"{name}_{how}": f"{value:.0f}"
        for how, u in zip(("held", "not"), used, strict=True)
        for name, value in (("cpu", u.cpu), ("mib", u.anonymous / 2**20))
    }
    if verb == "predict":
        gap = max(abs(x - y) / max(abs(x), 1e-2) for x, y in zip(*map(numbers, said), strict=True))
        yield {"what": "predict, gap", "value": f"{gap:.2g}", "asked": most, **took}
        return
    plans = [s["plan"] if merges else s for s in said]
    one, other = ([s["decision"] for s in plan["spaces"]] for plan in plans)
    changed = sum(x != y for x, y in zip(one, other, strict=True))
    yield {"what": f"{verb}, decisions changed of {len(one)}", "value": changed, "asked": 0, **took}
    if merges:
        gap = max(
            float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(min=1e-30))
            for x, y in zip(*map(tensors, outputs), strict=True)
        )
        yield {"what": f"{verb}, largest gap between tensors", "value": f"{gap:.2g}", "asked": most, **took}


def numbers(value: Any) -> Iterator[float]:
    """All floats of a JSON document, in order."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from numbers(value[key])
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


def tensors(folder: Path) -> Iterator[torch.Tensor]:
    """All tensors of a folder, by name."""
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))
    for name in sorted(where):
        with safe_open(where[name], "pt") as opened:
            yield opened.get_tensor(name)


if __name__ == "__main__":
    sys.exit(main())
