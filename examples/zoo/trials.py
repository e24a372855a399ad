"""What merges say of the inputs once they are made, and what they lose on others: trials.csv, here and in `wider/`,
which grow and may be stopped at any time.

    python examples/zoo/trials.py --minutes 9
    python examples/zoo/trials.py --wider --minutes 9

A row is one way of merging one pair. `hard` to `sharp` are of the trial that `mergeid predict --try` makes: on every
second calibration input, of a merge that was repaired or solved on the others. `loss` is what the merge that was made
with all of them loses on the test set at the midpoint, beyond the mean of both models (`half`, `other`: on two halves
of it). The columns after these are what the predictor sees of the pair without any merge; of solved merges they are
those of the way called `best`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import time
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import features
import midpoints
import pairs_table as table
import recipes
import torch
import wider
from build import HERE, Zoo
from families import FAMILIES
from measuring import ADAPTER, PairOfNets
from recipes import Pair
from tasks import Examples
from torch import nn
from training import scores

from mergeid.basics.state import load_weights
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.models.examples import Examples as Given
from mergeid.neuron_graph.group import same_element
from mergeid.neuron_graph.neuron_graph import Element
from mergeid.prediction.features import Features
from mergeid.prediction.probe import probe
from mergeid.prediction.trial import TogetherSums
from mergeid.request.request import Run
from mergeid.stages.open import Pair as Opened
from mergeid.stages.repair import LEANING, SOLVE, repair_merged
from mergeid.stages.trial import trials_of

FILE = "trials.csv"
SOLVED = {SOLVE: "solved", LEANING: "leaning"}
WAYS = {
    ("plain", "none"): "direct",
    ("plain", "bn"): "direct_repair",
    ("matched", "none"): "match",
    ("matched", "bn"): "match_repair",
}
ABOUT = ("pair", "family", "data", "kind", "made", "way", "best")
LOST = ("loss_a", "loss_b", "loss", "half", "other")
SAID = ("hard", "soft", "missed", "beyond", "sharp")


def measure(zoo: Zoo, pair: Pair, ways: Sequence[str] = ()) -> Iterator[features.Record]:
    """One row for every way of merging it, or for these. The columns are `ABOUT`, `LOST`, `SAID`, and features."""
    (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
    group, today = pair.a.group, datetime.date.today().isoformat()
    nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[group.family].repair, held, known)
    always = nets._plan(known, "always")
    tried = {
        SOLVED.get(t.repair) or WAYS.get((t.merge, t.repair)): t
        for t in trials_of(Opened(nets.a, nets.b, nets.graph), always, Given(known), Run(batch_size=len(known)))
    }
    seen = evidence(nets, known, always.element)
    best = min((w for w in seen if w in tried), key=lambda w: float(seen[w]["excess"]))
    with torch.no_grad():
        own = [scores(ADAPTER.forward(n.eval(), nets.test), nets.test["labels"])[0] for n in (a, b)]
    for way, net in merges(nets, known, leaning="leaning" in tried):
        if way not in tried or (ways and way not in ways):
            continue
        excess = nets.losses_of(net) - ((own[0] + own[1]) / 2).numpy()
        lost = (own[0].mean(), own[1].mean(), excess.mean(), excess[::2].mean(), excess[1::2].mean())
        yield {
            **dict(zip(ABOUT, (pair.id, group.family, group.data, pair.kind, today, way, best), strict=True)),
            **{k: float(v) for k, v in zip(LOST, lost, strict=True)},
            **{k: float(getattr(tried[way], k)) for k in SAID},
            **seen[best if way in SOLVED.values() else way],
        }


def evidence(nets: PairOfNets, known: Examples, matched: Element) -> dict[str, Features]:
    """Way -> what the predictor sees of it, and of both networks' outputs."""
    first, plain = features.with_weights(nets.work, nets.state_a), nets.graph.identity()
    partners = {"direct": features.with_weights(nets.work, nets.state_b(plain))}
    if not same_element(plain, matched):
        partners["match"] = features.with_weights(nets.work, nets.state_b(matched))
    said, together = features.said(first, partners["direct"], known), TogetherSums()
    with torch.no_grad():
        together.add(*(ADAPTER.forward(n.model.eval(), known.batch()) for n in (nets.a, nets.b)), None)
    out = {}
    for assignment, found in probe(first, partners, ADAPTER.forward, Given(known), ends=said).items():
        for suffix, own in (("", found.plain), ("_repair", found.repaired)):
            if own is not None:
                out[assignment + suffix] = {**together.features(), **own}
    return out


def merges(nets: PairOfNets, known: Examples, leaning: bool) -> Iterator[tuple[str, nn.Module]]:
    """(way, network), each good until the next one is asked for."""
    plan = nets.planned(known)
    yield from midpoints.merges(nets, known, plan)
    if leaning:
        members, net = nets._members(plan, known), copy.deepcopy(nets.a.model)
        load_weights(net, {**members.merged_state(), **repair_merged(members, mode=LEANING).tensors})
        yield "leaning", net


def run(out: Path, zoo: Zoo, pairs: Sequence[Pair], minutes: float, ways: Sequence[str] = ()) -> None:
    """Measure what is not measured yet until time is up."""
    rows: list[features.Record] = list(table.read(out / FILE))  # type: ignore[arg-type]
    done, until = {r["pair"] for r in rows if not ways or r["way"] in ways}, time.monotonic() + 60 * minutes
    for pair in pairs:
        if pair.id in done:
            continue
        if time.monotonic() > until:
            break
        began = time.process_time()
        try:
            rows += measure(zoo, pair, ways)
        except MergeidError as error:
            print(f"{pair.id}: {error}", flush=True)
            continue
        features.write(out / FILE, rows)
        print(f"{pair.id} [{time.process_time() - began:.1f} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of {FILE} (default: that of the pairs)")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--wider", action="store_true", help="the pairs of wider/")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--kind", default="*", metavar="GLOB", help="of pairs, such as independent")
    parser.add_argument("--way", action="append", default=[], help="measure this way of pairs that lack it, no other")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further pair after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    folder, zoo, made = HERE, Zoo(options.cache), recipes.work()
    if options.wider:
        folder, zoo, made = HERE / "wider", wider.WiderZoo(options.cache), wider.work()
    known = {r["pair"] for r in table.read(folder / "pairs.csv")}
    some = [p for p in made if fnmatchcase(p.id, options.only) and fnmatchcase(p.kind, options.kind)]
    out = options.out or folder
    out.mkdir(parents=True, exist_ok=True)
    run(out, zoo, [p for p in some if p.id in known], options.minutes, options.way)


if __name__ == "__main__":
    main()
