"""Does mergeid's decision help where the match is poor? weak.csv: the pairs again, matched by activations alone on few
inputs, which parts many neurons that correspond.

    python examples/zoo/weak.py [--inputs 32] [--only GLOB]

needs the trained networks of build.py, and goes on where it was. Every row has the test losses at the midpoint of the
plain merge, of the match of every space, and of what mergeid decides on the same inputs, its last look included;
BatchNorm statistics are estimated again on these inputs too. report.py tables them beside the constant rules.
"""

from __future__ import annotations

import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import pairs_table as table
import torch
from build import Zoo, named
from families import FAMILIES
from measuring import PairOfNets
from recipes import Pair, work
from tasks import Examples

from mergeid.errors import MergeidWarning

FILE = "weak.csv"
COLUMNS = ["pair", "kind", "family", "matcher", "inputs", "auto_is", "overruled", "direct", "match", "auto"]
MATCHER = "activation"


def measure(zoo: Zoo, pair: Pair, inputs: int) -> table.Row:
    """One pair's row."""
    (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
    few = Examples(known.part.at(slice(inputs)))
    nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, few, MATCHER)
    elements = {"direct": nets.graph.identity(), "match": nets.always(few)}
    decision = nets.decide(few)
    elements["auto"] = decision.element
    row = {"pair": pair.id, "kind": pair.kind, "family": pair.a.group.family, "matcher": MATCHER}
    row |= {"inputs": str(inputs), "overruled": str(int(decision.overruled))}
    row["auto_is"] = named(decision.element, elements["direct"], elements["match"])
    return row | {k: f"{nets.middle(e, few):.5f}" for k, e in elements.items()}


def run(out: Path, cache: Path, inputs: int, only: str = "*") -> list[table.Row]:
    """Measure the table's pairs that weak.csv lacks; all rows."""
    zoo, rows = Zoo(cache), table.read(out / FILE)
    done = {(r["pair"], r["inputs"]) for r in rows}
    known = {r["pair"] for r in table.read(out / "pairs.csv")}
    left = [p for p in work() if p.id in known and fnmatchcase(p.id, only) and (p.id, str(inputs)) not in done]
    for count, pair in enumerate(left, 1):
        began = time.process_time()
        rows.append(measure(zoo, pair, inputs))
        table.write(out / FILE, COLUMNS, rows)
        said = " ".join(f"{k} {rows[-1][k]}" for k in ("direct", "match", "auto", "auto_is"))
        print(f"{count}/{len(left)} {pair.id} ({pair.kind}): {said} [{time.process_time() - began:.1f} s]", flush=True)
    return rows


def main() -> None:
    parser = table.options_of(__doc__, "pairs.csv and weak.csv", 32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    run(options.out, options.cache or options.out / "cache", options.inputs, options.only)


if __name__ == "__main__":
    main()
