"""The neuron graph of every timm, transformers and torchvision model, and of the models of seven further libraries that
no adapter knows (`pip install mergeid[coverage]`): does it trace, does it hold, what is frozen?

    python tests/bench/coverage.py timm [--jobs 2] [--only 'resnet*'] [--smallest] [--sample 50]
    python tests/bench/coverage.py timm --summary

Every model runs in a process of its own with a time limit. A row is written to ``tests/bench/tables/LIBRARY.csv`` as
soon as it is known, and a second run goes on where the first stopped; ``--again`` names rows to measure anew
(``failed``, ``stale``: of other code, ``all`` or a pattern). Models of one structure (the same modules with the same
settings) are measured once. Nothing is downloaded: weights are random and disturbed until no two neurons are alike.
Exit code 1 where an accepted graph failed.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import importlib
import json
import multiprocessing as mp
import os
import random
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import mergeid.neuron_graph

sys.path.insert(0, str(Path(__file__).parent))
import coverage_check
import coverage_live

HERE = Path(__file__).parent
TABLES = HERE / "tables"
COLUMNS = [
    *("name", "family", "traced", "verified", "held_again", "share", "spaces", "parameters", "seconds", "forward"),
    *("error", "error_again", "dtype", "failed", "unknown_ops", "frozen_by", "note", "problem", "code", "structure"),
]
SAME = [c for c in COLUMNS if c not in ("name", "family", "code", "structure")]
LIBRARIES = ("timm", "transformers", "torchvision")
LIVE = ("diffusers", "segmentation_models_pytorch", "open_clip", "monai", "torch_geometric", "torchaudio")
LIVE += ("sentence_transformers",)
"""Libraries whose models are given as live modules with example inputs."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=(*LIBRARIES, *LIVE))
    parser.add_argument("--only", default="*", help="glob of model names")
    parser.add_argument("--smallest", action="store_true", help="timm: the smallest model of every module")
    parser.add_argument("--sample", type=int, help="that many models, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--again", help="measure rows anew: 'failed', 'stale', 'all' or a glob")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no model after this time")
    parser.add_argument("--table", type=Path, help="CSV file (default: tests/bench/tables/LIBRARY.csv)")
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    return parser.parse_args()


def measure(library: str, name: str, end: Connection) -> None:
    """In a process of its own: one row, sent through `end`."""
    import torch

    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "traced": 0}
    models = importlib.import_module(f"coverage_{library}")
    try:
        row["structure"] = models.structure(name) if hasattr(models, "structure") else name
        end.send(row["structure"])  # the answer is None, or the row of a model of the same structure
        row |= end.recv() or (coverage_live if library in LIVE else coverage_check).check(models.make(name))
    except Exception as error:  # whatever a model does wrong is a row of the table
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        row["problem"] = (
            str(error)
            if str(error).startswith("not built: ")
            else f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({at})"
        )
    end.send(row)


def read(table: Path) -> dict[str, dict[str, str]]:
    if not table.exists():
        return {}
    with table.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def write(table: Path, rows: dict[str, dict[str, Any]]) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    new = table.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    os.replace(new, table)


def code() -> str:
    """A digest of the code that a row depends on."""
    digest = hashlib.sha256()
    for file in sorted(Path(mergeid.neuron_graph.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def good(row: dict[str, Any]) -> bool:
    if coverage_live.NO_SPACE in str(row.get("note", "")):
        return str(row.get("verified")) == "1"
    return str(row.get("verified")) == "1" and str(row.get("held_again")) == "1" and int(row.get("spaces") or 0) > 0


def twin_of(row: dict[str, Any]) -> dict[str, Any]:
    """The row of another name with the same structure."""
    note = str(row.get("note", ""))
    text = note if "same structure" in note else "; ".join(x for x in (note, f"same structure as {row['name']}") if x)
    return {**{c: row.get(c, "") for c in SAME}, "note": text}


def run(library: str, names: list[str], table: Path, jobs: int, limit: float, deadline: float) -> None:
    """Measure the named models, `jobs` at a time, each in a forked process."""
    rows: dict[str, dict[str, Any]] = dict(read(table))
    family = families(library)
    context, now = mp.get_context("fork"), code()
    waiting = list(names)
    running: dict[Connection, tuple[str, Any, float]] = {}
    known = {r["structure"]: twin_of(r) for r in rows.values() if good(r) and r.get("code") == now}
    done = 0
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            name = waiting.pop(0)
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(library, name, theirs))
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic())
        if not running:
            break
        ready = wait(list(running), timeout=1.0)
        for end, (name, process, began) in list(running.items()):
            row: dict[str, Any] | None = None
            if end in ready:
                try:
                    row = end.recv()
                    if isinstance(row, str):
                        end.send(known.get(row))
                        continue
                except EOFError:
                    row = {"name": name, "traced": 0, "problem": "the process died (memory?)"}
            elif time.monotonic() - began > limit:
                process.kill()
                row = {"name": name, "traced": 0, "problem": f"not done after {limit:.0f} s"}
            if row is None:
                continue
            process.join()
            end.close()
            del running[end]
            done += 1
            rows[name] = {"family": family.get(name, ""), "code": now, **row}
            if good(rows[name]):
                known.setdefault(str(row["structure"]), twin_of(rows[name]))
            write(table, rows)
            say = "ok  " if good(row) else "FAIL"
            about = row.get("problem") or f"{row.get('spaces')} spaces, share {row.get('share')}"
            took = time.monotonic() - began
            print(f"[{done}/{len(names)}] {say} {name}: {about} {row.get('failed', '')} ({took:.0f} s)", flush=True)


def families(library: str) -> dict[str, str]:
    return dict(importlib.import_module(f"coverage_{library}").families())


def chosen(args: argparse.Namespace, rows: dict[str, dict[str, str]]) -> list[str]:
    names = [n for n in importlib.import_module(f"coverage_{args.library}").names() if fnmatch.fnmatch(n, args.only)]
    if args.smallest:
        smallest = json.loads((HERE.parent / "fixtures" / "timm_smallest.json").read_text())
        names = sorted(smallest)
    if args.sample:
        names = sorted(random.Random(args.seed).sample(names, min(args.sample, len(names))))
    if args.again == "all":
        return names
    if args.again == "failed":
        return [n for n in names if n in rows and not good(rows[n])]
    if args.again == "stale":
        return [n for n in names if n in rows and rows[n].get("code") != code()]
    if args.again:
        return [n for n in names if fnmatch.fnmatch(n, args.again)]
    return [n for n in names if n not in rows]


def summary(rows: dict[str, dict[str, str]]) -> list[str]:
    """What the documentation says of a table, and the rows that fall short."""
    if not rows:
        return ["no rows"]
    built = [r for r in rows.values() if not r["problem"].startswith("not built")]
    held = [r for r in built if good(r)]
    lines = [f"{len(rows)} models, {len(built)} built, {len(held)} hold ({len(held) / max(len(built), 1):.2%})"]
    if held:
        share = sorted(float(r["share"]) for r in held)
        seconds = sorted(float(r["seconds"]) for r in held)
        lines.append(
            f"share of parameters on a free axis: median {statistics.median(share):.3%}, "
            f"tenth percentile {share[len(share) // 10]:.2%}, lowest {share[0]:.1%}"
        )
        lines.append(
            f"trace and solve without the forward pass: median {statistics.median(seconds):.2f} s, "
            f"worst {seconds[-1]:.1f} s ({max(held, key=lambda r: float(r['seconds']))['name']})"
        )
    for r in rows.values():
        if not good(r):
            lines.append(f"does not hold: {r['name']}: {r['problem'] or r['failed'] or 'no free space'}")
        elif float(r["share"]) < 0.9:
            lines.append(f"share below 90 %: {r['name']} {float(r['share']):.3f}: {r['frozen_by']}")
    return lines


def main() -> int:
    args = options()
    table = args.table or TABLES / f"{args.library}.csv"
    rows = read(table)
    if not args.summary:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if args.library in LIBRARIES:
            import timm.models  # noqa: F401  # imported before forking: children share it
            import transformers  # noqa: F401

        names = chosen(args, rows)
        print(f"{len(names)} models to measure, {len(rows)} in {table}", flush=True)
        run(args.library, names, table, args.jobs, args.limit, time.monotonic() + 60 * args.minutes)
        rows = read(table)
    print("\n".join(summary(rows)))
    return int(any(r["failed"] for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
