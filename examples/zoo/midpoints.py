"""Every way of merging each pair of the zoo at the midpoint, with what can be known of it without labels or with 64:
midpoints.csv, which grows and may be stopped at any time.

    python examples/zoo/midpoints.py --minutes 9

Ways: direct, match, the same with BatchNorm re-estimated, solved (from what mergeid plans), and what `merge --data`
does by default (`default_is` says what that was). Test losses are on all examples that no network was trained on;
`trial_*` are of the 512 calibration inputs with pseudo-labels (`mergeid.prediction.trial`), `few_*` of the first 64
test examples with their labels, `rest_*` of all the others.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pairs_table as table
import torch
from build import HERE, Zoo
from families import FAMILIES
from measuring import ADAPTER, PairOfNets
from recipes import Pair, work
from tasks import Examples
from torch import Tensor, nn
from training import scores

from mergeid.basics.state import load_weights
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.neuron_graph.group import same_element
from mergeid.prediction.trial import TogetherSums, TrialSums
from mergeid.request.request import Run
from mergeid.results.plan import Plan
from mergeid.stages.compare import label, last_look
from mergeid.stages.repair import SOLVE, repair_merged

FILE = "midpoints.csv"
WAYS = ("direct", "direct_repair", "match", "match_repair", "solved")
FEW = 64
OF_WAY = ("loss", "points", "half", "other", "few", "few_error", "rest", "trial_hard", "trial_soft", "trial_missed")
COLUMNS = (
    *("pair", "family", "data", "kind", "classes", "verdict", "made"),
    *("loss_a", "loss_b", "loss_both", "accuracy_a", "accuracy_b", "accuracy_both"),
    *("apart_a", "apart_b", "right_a", "right_b", "right_both", "agreed", "entropy"),
    *(f"{v}_{w}" for w in WAYS for v in OF_WAY),
    *("loss_default", "points_default", "default_is", "seconds"),
)


@dataclass(frozen=True)
class Outputs:
    """Logits of one network on the test examples and on the calibration inputs."""

    test: Tensor
    known: Tensor


@torch.no_grad()
def outputs(net: nn.Module, test: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> Outputs:
    net.eval()
    return Outputs(ADAPTER.forward(net, dict(test)), ADAPTER.forward(net, dict(known)))


def merges(nets: PairOfNets, known: Examples, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """(way, network), as far as the family has it; the network is good until the next one is asked for."""
    plain, matched = nets.graph.identity(), nets.always(known)
    moved = not same_element(plain, matched)
    for name, element in (("direct", plain), ("match", matched)) if moved else (("direct", plain),):
        b = nets.state_b(element)
        for repaired in (False, True) if nets.repair == "bn" else (False,):
            nets.at(b, 0.5, nets.repairer(b, known) if repaired else None)
            yield name + ("_repair" if repaired else ""), nets.work
    members = nets._members(plan, known)
    net = copy.deepcopy(nets.a.model)
    try:
        load_weights(net, {**members.merged_state(), **repair_merged(members, mode=SOLVE).tensors})
    except MergeidError:
        return
    yield "solved", net


def default(nets: PairOfNets, known: Examples, plan: Plan) -> tuple[str, nn.Module]:
    """What `merge --data` writes, and which merge and repair that is."""
    written, found = last_look(nets._members(plan, known), "auto", run=Run(batch_size=len(known)))
    net = copy.deepcopy(nets.a.model)
    load_weights(net, {**written.merged_state(), **repair_merged(written, mode=found.repair).tensors})
    return label(found.chosen, found.repair), net


def measure(zoo: Zoo, pair: Pair, made: str = "") -> table.Row:
    (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
    began = time.process_time()
    nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, known)
    test, calibration = held.batch(), known.batch()
    ends = [outputs(n, test, calibration) for n in (a, b)]
    both = (ends[0].test.softmax(-1) + ends[1].test.softmax(-1)).div(2).log()
    together = TogetherSums()
    together.add(ends[0].known, ends[1].known, None)
    labels = test["labels"]
    plan = nets.planned(known)
    row: dict[str, object] = {
        "pair": pair.id,
        "family": pair.a.group.family,
        "data": pair.a.group.data,
        "kind": pair.kind,
        "classes": ends[0].test.shape[-1],
        "verdict": plan.verdict,
        "made": made,
        **together.features(),
    }
    own = []
    for name, out in (("a", ends[0].test), ("b", ends[1].test), ("both", both)):
        losses, right = scores(out, labels)
        row |= {f"loss_{name}": float(losses.mean()), f"accuracy_{name}": float(right.mean())}
        own.append((losses, right))
    mean = [(x + y) / 2 for x, y in zip(own[0], own[1], strict=True)]
    for way, net in merges(nets, known, plan):
        out = outputs(net, test, calibration)
        losses, right = scores(out.test, labels)
        excess, trial = (losses - mean[0]).numpy(), TrialSums()
        trial.add(ends[0].known, ends[1].known, out.known, None)
        cells = {
            "loss": excess.mean(),
            "points": 100 * float((mean[1] - right).mean()),
            "half": excess[::2].mean(),
            "other": excess[1::2].mean(),
            "few": excess[:FEW].mean(),
            "few_error": excess[:FEW].std(ddof=1) / np.sqrt(min(FEW, len(excess))),
            "rest": excess[FEW:].mean() if len(excess) > FEW else np.nan,
            **{f"trial_{k}": v for k, v in trial.features().items() if f"trial_{k}" in OF_WAY},
        }
        row |= {f"{k}_{way}": v for k, v in cells.items()}
    row["default_is"], net = default(nets, known, plan)
    losses, right = scores(outputs(net, test, calibration).test, labels)
    row["loss_default"] = float((losses - mean[0]).mean())
    row["points_default"] = 100 * float((mean[1] - right).mean())
    row["seconds"] = round(time.process_time() - began, 1)
    return {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}


def run(out: Path, cache: Path, only: str = "*", minutes: float = 9.0, made: str = "", kind: str = "*") -> int:
    """Measure what is not measured yet until time is up; the number of new rows."""
    zoo, rows, began = Zoo(cache), table.read(out / FILE), time.monotonic()
    done, known = ({r["pair"] for r in t} for t in (rows, table.read(out / "pairs.csv")))
    count = 0
    for pair in work():
        if (
            pair.id in done
            or (known and pair.id not in known)
            or not fnmatchcase(pair.id, only)
            or not fnmatchcase(pair.kind, kind)
        ):
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        rows.append(measure(zoo, pair, made))
        table.write(out / FILE, COLUMNS, rows)
        count += 1
        solved = rows[-1].get("loss_solved", "–")
        print(f"{pair.id}: direct {rows[-1]['loss_direct']}, solved {solved} [{rows[-1]['seconds']} s]", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--kind", default="*", metavar="GLOB", help="of pairs, such as independent")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further pair after so many")
    parser.add_argument("--made", default="", help="when these networks were made, if after the coefficients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    run(options.out, options.cache, options.only, options.minutes, options.made, options.kind)


if __name__ == "__main__":
    main()
