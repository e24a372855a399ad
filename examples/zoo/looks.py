"""Does the last look choose well among repairs? looks.csv: pairs of networks with BatchNorm, on images and on tables.

    python examples/zoo/looks.py [--inputs 512] [--fresh] [--only GLOB]

trains what the cache lacks, and goes on where it was. Every row has the test loss (nats) of every merge that was at
hand (plain, planned, matched; as it is, with BatchNorm statistics estimated again on all calibration inputs, and solved
where that was tried), which one mergeid chose without labels, and how far it says that this one is from the two
networks. `lost` is the test loss of the chosen merge minus that of the best one, `error` the standard error of that
difference over the test examples: the small tables cannot tell 0.01 nats apart. `--fresh`: calibration inputs that no
network was trained on.

The rule was chosen on other networks: those of the groups that end in `.0`, and on the first six tables.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import numpy as np
import pairs_table as table
import tasks
import torch
from build import Zoo
from families import FAMILIES
from measuring import PairOfNets
from recipes import GROUPS, Group, Pair, pairs
from tasks import Examples

from mergeid.errors import MergeidWarning

FILE = "looks.csv"
REPAIRED = ("", "+bn", "+solve", "+solve+lean")
COLUMNS = (
    *("pair", "kind", "family", "data", "inputs", "test", "loss_a", "loss_b"),
    *(f"{merge}{repair}" for merge in ("plain", "mixed", "matched") for repair in REPAIRED),
    *("chosen", "distance", "lost", "error", "seconds"),
)
TABLES = (
    Group("tabular", "few", 1, 32, 2, steps=200, decay=0.03),
    Group("tabular", "many", 1, 64, 2, steps=500, decay=0.03),
    Group("tabular", "tails", 1, 48, 2, steps=300, decay=0.03),
    Group("tabular", "wide", 1, 48, 3, steps=400, decay=0.03),
    Group("tabular", "noisy", 1, 32, 2, steps=250, decay=0.03),
    Group("tabular", "columns", 1, 48, 3, steps=400, decay=0.03),
    Group("tabular", "cancer", 1, 24, 1, steps=250, decay=0.03),
    Group("tabular", "wine", 1, 32, 2, steps=250, decay=0.03),
)
IMAGES = tuple(g for g in GROUPS if FAMILIES[g.family].repair == "bn" and g.index > 0)
FEW = 64
"""Calibration inputs of rows that are summed up by themselves."""
MOST = {"tabular": 10, "images": 15}
"""Pairs of a group."""


def work() -> list[Pair]:
    """The pairs, one of every group in turn."""
    found = [
        (k, i, pair)
        for i, g in enumerate((*TABLES, *IMAGES))
        for k, pair in enumerate(pairs(g)[: MOST["tabular" if g in TABLES else "images"]])
    ]
    return [pair for _, _, pair in sorted(found, key=lambda row: row[:2])]


def measure(zoo: Zoo, pair: Pair, inputs: int, fresh: bool) -> table.Row:
    """One pair's row."""
    (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
    if fresh:
        half = len(held.part) // 2
        held, known = Examples(held.part.at(slice(half, None))), Examples(held.part.at(slice(half)))
    known = Examples(known.part.at(slice(inputs)))
    began = time.process_time()
    nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, known)
    chosen, losses = nets.looked(known)
    own = chosen.label
    seconds = time.process_time() - began
    best = min(losses.values(), key=lambda values: float(values.mean()))
    gap = losses[own] - best
    row = dict.fromkeys(COLUMNS, "")
    row |= {"pair": pair.id, "kind": pair.kind, "family": pair.a.group.family, "data": pair.a.group.data}
    row |= {"inputs": _inputs(len(known), fresh), "test": str(len(held)), "chosen": own}
    row |= {f"loss_{n}": f"{float(nets.losses_of(net).mean()):.4f}" for n, net in (("a", a), ("b", b))}
    row |= {name: f"{float(values.mean()):.4f}" for name, values in losses.items()}
    row |= {"distance": f"{chosen.worst.value:.4f}", "lost": f"{gap.mean():.4f}", "seconds": f"{seconds:.1f}"}
    return row | {"error": f"{float(gap.std(ddof=1)) / np.sqrt(len(gap)):.4f}"}


def _inputs(count: int, fresh: bool) -> str:
    return f"{count} fresh" if fresh else str(count)


def run(out: Path, cache: Path, inputs: int, fresh: bool = False, only: str = "*") -> list[table.Row]:
    """Measure what looks.csv lacks; all rows."""
    zoo, rows = Zoo(cache), table.read(out / FILE)
    done = {(r["pair"], r["inputs"].endswith("fresh"), int(r["inputs"].split()[0])) for r in rows}
    for pair in work():
        known = min(inputs, len(tasks.test(pair.a.group.data)) // 2 if fresh else len(zoo.data(pair)[1]))
        if not fnmatchcase(pair.id, only) or (pair.id, fresh, known) in done:
            continue
        rows.append(measure(zoo, pair, inputs, fresh))
        table.write(out / FILE, COLUMNS, rows)
        r = rows[-1]
        print(pair.id, r["inputs"], r["chosen"], f"lost {r['lost']} ± {r['error']} [{r['seconds']} s]", flush=True)
    return rows


def summary(rows: Sequence[table.Row]) -> str:
    """Markdown: how often the chosen merge, and the constant rules, are within 0.01 nats of the best."""
    lines = [
        "| pairs | calibration | n | chosen | never estimated again | always | beyond the test set's noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for of, tabular in (("images", False), ("tables", True)):
        for fresh, few in product((False, True), (False, True)):
            part = [r for r in rows if (r["family"] == "tabular") == tabular and _kind(r) == (fresh, few)]
            if not part:
                continue
            known = ("not trained on" if fresh else "trained on") + (f", {FEW}" if few else "")
            cells = [of, known, str(len(part))]
            cells.append(_share([float(r["lost"]) for r in part]))
            for ending in ("", "+bn"):
                cells.append(_share([_lost(r, ending) for r in part]))
            sure = sum(float(r["lost"]) - 2 * float(r["error"]) > 0.01 for r in part)
            lines.append("| " + " | ".join([*cells, f"{sure} worse by more"]) + " |")
    return "\n".join(lines)


def _kind(row: table.Row) -> tuple[bool, bool]:
    """Whether its calibration inputs are fresh, and whether they are few."""
    return row["inputs"].endswith("fresh"), int(row["inputs"].split()[0]) == FEW


def _losses(row: table.Row, ending: str | None = None) -> list[float]:
    names = [f"{m}{e}" for m in ("plain", "mixed", "matched") for e in REPAIRED if ending is None or e == ending]
    return [float(row[n]) for n in names if row.get(n)]


def _lost(row: table.Row, ending: str) -> float:
    """The best merge of one kind against the best of all: a constant rule that knows which way to match."""
    return min(_losses(row, ending)) - min(_losses(row))


def _share(lost: Sequence[float]) -> str:
    values = np.array(lost)
    return f"{100 * float((values <= 0.01).mean()):.1f} % (mean {values.mean():.4f})"


def main() -> None:
    parser = table.options_of(__doc__, "looks.csv", 512)
    parser.add_argument("--fresh", action="store_true", help="calibration inputs that no network was trained on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    rows = run(options.out, options.cache or options.out / "cache", options.inputs, options.fresh, options.only)
    print(summary(rows))


if __name__ == "__main__":
    main()
