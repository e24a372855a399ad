"""Is each space's decision the right one? Flip it, hold all others, and measure the merge again.

    python examples/zoo/flips.py          # 200 spaces, resumable: flips.csv; report.py puts what it says in summary.md

A space that mergeid would leave as it lies is matched instead, or the other way round, and the test loss at the
midpoint is measured before and after, with the repair of `mergeid merge` (BatchNorm statistics estimated again). Plans
are those of 512 calibration inputs, without the last look, which judges whole merges. Pairs come in a random order, and
at most `PER_PAIR` of a pair's spaces are flipped, drawn among those whose other choice is another one, and is known.
"""

from __future__ import annotations

import argparse
import warnings
import zlib
from pathlib import Path

import numpy as np
import pairs_table as table
import torch
from build import Zoo
from families import FAMILIES
from measuring import PairOfNets
from recipes import Pair, work

from mergeid.errors import MergeidWarning
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

HERE = Path(__file__).parent
SEED = 0
PER_PAIR = 2
COLUMNS = (
    *("pair", "family", "kind", "spaces", "settled", "unknown"),
    *("space", "size", "decision", "flipped_to", "moved", "loss", "loss_flipped", "worse_by", "error"),
)
"""`settled`: spaces of the pair whose match is the identity; `unknown`: whose other choice would need another plan.
`worse_by`: loss_flipped - loss, mean over the test examples, with its standard error; empty in a pair without a flip.
"""


def other_choice(graph: NeuronGraph, space: Space, element: Element, matched: Element) -> Element | None:
    """The element with one space's choice turned round, between lying as it is and its match, and all other choices
    held; None where some space would have to be matched under parents that the plan did not try.

    Args:
        element: as planned. matched: with every space matched.
    """
    out: Element = {}
    for s in graph.spaces:
        follow = graph.follow(s, out)
        matches = not np.array_equal(element[s.id], graph.follow(s, element))
        if s.id == space.id:
            matches = not matches
        if not matches:
            out[s.id] = follow
            continue
        tried = next((e for e in (element, matched) if all(np.array_equal(out[p], e[p]) for p in s.parents)), None)
        if s.id == space.id:
            # what it was matched to, it now is not: only the match of all spaces holds another choice
            tried = matched if all(np.array_equal(out[p], matched[p]) for p in s.parents) else None
        if tried is None:
            return None
        out[s.id] = tried[s.id]
    return out


def flips_of(nets: PairOfNets, pair: Pair) -> list[table.Row]:
    """Up to `PER_PAIR` rows of a pair; one without a space where nothing can be flipped."""
    plan = nets.planned(nets.calibration)
    assert plan.matched is not None
    graph = plan.graph
    choices, settled, unknown = [], 0, 0
    for space, record in zip(graph.spaces, plan.spaces, strict=True):
        other = other_choice(graph, space, plan.element, plan.matched)
        if other is None:
            unknown += 1
        elif np.array_equal(other[space.id], plan.element[space.id]):
            settled += 1
        else:
            choices.append((space, record, other))
    row = {"pair": pair.id, "family": pair.a.group.family, "kind": pair.kind, "spaces": str(len(graph.spaces))}
    row |= {"settled": str(settled), "unknown": str(unknown)}
    if not choices:
        return [row]
    before = nets.losses(plan.element, nets.calibration)
    rows = []
    order = np.random.default_rng([SEED, zlib.crc32(pair.id.encode())]).permutation(len(choices))
    for space, record, other in (choices[k] for k in order[:PER_PAIR]):
        after = nets.losses(other, nets.calibration)
        gap = after - before
        to_match = np.array_equal(plan.element[space.id], graph.follow(space, plan.element))
        moved = int((other[space.id] != plan.element[space.id]).sum())
        rows.append(
            {
                **row,
                "space": space.label,
                "size": str(space.size),
                "decision": record.decision,
                "flipped_to": "match" if to_match else "direct",
                "moved": str(moved),
                "loss": f"{before.mean():.5f}",
                "loss_flipped": f"{after.mean():.5f}",
                "worse_by": f"{gap.mean():.5f}",
                "error": f"{gap.std(ddof=1) / np.sqrt(len(gap)):.5f}",
            }
        )
    return rows


def flip(out: Path, cache: Path, count: int) -> list[table.Row]:
    """Measure until `count` spaces are flipped; all rows."""
    zoo, rows = Zoo(cache), table.read(out / "flips.csv")
    done = {r["pair"] for r in rows}
    measured = {r["pair"] for r in table.read(out / "pairs.csv")}
    pairs = [p for p in work() if p.id in measured]
    for k in np.random.default_rng(SEED).permutation(len(pairs)):
        flipped = sum(bool(r["space"]) for r in rows)
        if flipped >= count:
            break
        pair = pairs[k]
        if pair.id in done:
            continue
        (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
        nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, known)
        new = [{c: r.get(c, "") for c in COLUMNS} for r in flips_of(nets, pair)]
        rows += new[: count - flipped]
        table.write(out / "flips.csv", COLUMNS, rows)
        print(f"{flipped}/{count} {pair.id}: " + ", ".join(f"{r['space']} {r['worse_by']}" for r in new), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of pairs.csv (which pairs) and flips.csv")
    parser.add_argument("--cache", type=Path, help="folder of the trained networks (default: OUT/cache)")
    parser.add_argument("--count", type=int, default=200, help="spaces to flip")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    flip(options.out, options.cache or options.out / "cache", options.count)


if __name__ == "__main__":
    main()
