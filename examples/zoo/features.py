"""What the predictor and its rivals see of every pair of the zoo: features.csv, which grows with pairs.csv.

    python examples/zoo/features.py

computes what the table lacks from the zoo's cached networks. No network between two others is run.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pairs_table as table
import torch
from baselines import rival_features
from build import HERE, Zoo
from families import FAMILIES
from measuring import ADAPTER, PairOfNets, loaded
from recipes import Pair, work
from tasks import Examples, shape
from torch import Tensor, nn

from mergeid.basics.state import load_weights
from mergeid.errors import MergeidWarning
from mergeid.models.examples import Examples as Inputs
from mergeid.plugins import Batch
from mergeid.prediction.features import EndSums, Features
from mergeid.prediction.probe import EXAMPLES, probe
from mergeid.prediction.sketch import make_sketch
from mergeid.prediction.sketched import Standard, as_elements, output_features, sketch_features

FILE = "features.csv"
Record = dict[str, "str | float | int"]


def random_inputs(data: str, count: int = EXAMPLES) -> list[Batch]:
    """Inputs that need no data: standard normal pixels, uniform tokens."""
    about, generator = shape(data), torch.Generator().manual_seed(0)
    if about.columns:
        return [{"arg0": x} for x in torch.randn(count, about.columns, generator=generator)]
    if about.side:
        return [{"arg0": x} for x in torch.randn(count, 1, about.side, about.side, generator=generator)]
    return [{"arg0": x} for x in torch.randint(about.tokens, (count, 16), generator=generator)]


def records(zoo: Zoo, pair: Pair) -> Iterator[Record]:
    """One per mode, assignment and repair."""
    (a, b), (held, known) = zoo.nets(pair), zoo.data(pair)
    nets = PairOfNets(a, b, zoo.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, known)
    plain = nets.graph.identity()
    first, second = with_weights(nets.work, nets.state_a), with_weights(nets.work, nets.state_b(plain))
    outputs = said(first, second, known)
    for mode, data, calibration in (
        ("inputs", known, known),
        ("weights", random_inputs(pair.a.group.data), None),
    ):
        partners = {"direct": second, "match": with_weights(nets.work, nets.state_b(nets.always(calibration)))}
        found = probe(first, partners, ADAPTER.forward, Inputs(data), ends=outputs if mode == "inputs" else None)
        for assignment, evidence in found.items():
            rival: Features = {}
            if mode == "inputs":
                rival = rival_features(first, partners[assignment], ADAPTER.forward, known)
            for repaired, features in ((0, evidence.plain), (1, evidence.repaired)):
                if features is not None:
                    yield {
                        "pair": pair.id,
                        "mode": mode,
                        "assignment": assignment,
                        "repaired": repaired,
                        **features,
                        **rival,
                    }
    example = {k: v[:2] for k, v in known.batch().items()}
    sketches = [Standard(make_sketch(loaded(n, pair.id, example), nets.graph, known)) for n in (first, second)]
    elements = {"matched": plain, **as_elements(*sketches)}
    own = output_features(*sketches)
    for assignment, element in elements.items():
        for repaired in (0, 1) if sketches[0].sketch.repairable else (0,):
            features, _ = sketch_features(*sketches, element, own, repaired=bool(repaired))
            name = assignment.removesuffix("ed")
            yield {"pair": pair.id, "mode": "sketches", "assignment": name, "repaired": repaired, **features}


def said(a: nn.Module, b: nn.Module, known: Examples) -> EndSums:
    """What both networks say of the half of the calibration inputs that matching runs."""
    half = {k: v[::2] for k, v in known.batch().items()}
    ends = EndSums()
    with torch.no_grad():
        ends.add(ADAPTER.forward(a.eval(), half), ADAPTER.forward(b.eval(), half), None)
    return ends


def with_weights(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the network with other weights."""
    net = copy.deepcopy(model)
    load_weights(net, state)
    return net


def write(path: Path, rows: list[Record]) -> None:
    columns = list(dict.fromkeys(k for r in rows for k in r))
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=HERE / "pairs.csv")
    parser.add_argument("--out", type=Path, default=HERE / FILE)
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    rows: list[Record] = list(table.read(options.out))  # type: ignore[arg-type]
    done = {r["pair"] for r in rows}
    measured = {r["pair"] for r in table.read(options.pairs)}
    zoo = Zoo(options.cache)
    for pair in work():
        if pair.id in measured and pair.id not in done:
            began = time.perf_counter()
            rows += records(zoo, pair)
            write(options.out, rows)
            print(f"{pair.id} [{time.perf_counter() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
