"""A wider zoo: kinds of networks and of training that the first one lacks, in tables of the same columns.

    python examples/zoo/wider.py --minutes 9            # goes on where it was stopped
    python examples/zoo/fresh.py                        # what the coefficients that ship say of these pairs

Tables, recurrent text classifiers, GroupNorm and standardised weights, MambaOut- and NFNet-types; dense concatenation,
inverted residuals, text classifiers by convolution, gated MLPs; grouped convolutions, PoolFormers, bags of words,
temporal convolutions, tanh; fine-tunes of low rank; SGD at large rates; weak networks (few steps) and collapsed ones (a
rate far too large); calibration inputs of another kind than the training's.
Tables lie in `wider/`, networks in `cache/`. Every pair has its curves (pairs.csv), what the predictor sees of it
(features.csv), and every way at the midpoint, solved too, with the day it was made (midpoints.csv).
"""

from __future__ import annotations

import argparse
import datetime
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path

import features
import midpoints
import pairs_table as table
import torch
from build import HERE, Zoo
from families import FAMILIES
from recipes import Group, Model, Pair, models, pairs
from tasks import Examples, calibration
from torch import Tensor, nn
from torch.nn.utils import parametrize
from training import load, path
from wider_families import WIDER

from mergeid.errors import MergeidError, MergeidWarning

FAMILIES.update(WIDER)
LARGE, BURNT = 8.0, 300.0
"""Multiples of a family's rate: large, and far too large."""
RANK = 4


class Low(nn.Module):
    """W + B A, of which A and B are trained."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@dataclass(frozen=True)
class LowRank(Model):
    """A fine-tune that changes its linear layers by matrices of a low rank, and nothing else."""

    rank: int = RANK

    def prepare(self, net: nn.Module) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(self.seed)
        for p in net.parameters():
            p.requires_grad_(False)
        layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", Low(layer.weight, self.rank, generator))

        def finish() -> None:
            for layer in layers:
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

        return finish


@dataclass(frozen=True)
class Elsewhere(Pair):
    """A pair that is calibrated on inputs of another variant of its data than it was trained on."""

    inputs: str = "turned"

    @property
    def id(self) -> str:
        return f"{super().id}~{self.inputs}"


class WiderZoo(Zoo):
    def data(self, pair: Pair) -> tuple[Examples, Examples]:
        held, known = super().data(pair)
        if isinstance(pair, Elsewhere):
            known = Examples(calibration(pair.a.group.data, (pair.inputs, pair.inputs)))
        return held, known


PLAIN = (
    Group("tabular", "wide", 3, 48, 2, steps=300),
    Group("gru", "packages", 3, 32, 1, steps=300),
    Group("groupnorm", "fashion", 3, 16, 2, steps=300),
    Group("mambaout", "mnist", 3, 16, 1),
    Group("nfnet", "fashion", 3, 16, 1, steps=300),
    Group("standardised", "mnist", 3, 16, 2),
    Group("lstm", "modules", 3, 32, 1, steps=300),
    Group("tabular", "many", 4, 64, 2, steps=300),
    Group("gru", "modules", 4, 48, 2, steps=300),
    Group("groupnorm", "digits", 4, 12, 2),
    Group("mambaout", "fashion", 4, 24, 1),
    Group("nfnet", "mnist", 4, 16, 2, steps=300),
    Group("standardised", "fashion", 4, 12, 3, steps=300),
    Group("lstm", "packages", 4, 32, 2, steps=300),
    Group("tabular", "columns", 5, 32, 1, steps=200),
    Group("tabular", "heavy", 6, 48, 3, steps=300),
)
"""Groups with the kinds of pairs that the first zoo has, less asymmetric ones."""
LOW = tuple(
    Group(family, data, 5, 32, 2, steps=300)
    for family, data in (("bert", "packages"), ("gpt", "code"), ("vit", "fashion"), ("llama", "prose"))
)
LARGE_RATES = (
    Group("mlp", "fashion", 7, 64, 2, steps=300, rate=LARGE),
    Group("resnet-narrow", "mnist", 7, 12, 2, rate=LARGE),
    Group("vgg", "digits", 7, 12, 3, rate=LARGE),
)
WEAK = (
    Group("resnet-narrow", "fashion", 8, 12, 2, steps=20),
    Group("mlp", "mnist", 8, 64, 2, steps=20),
    Group("vit", "mnist", 8, 32, 2, steps=30),
    Group("bert", "modules", 8, 32, 2, steps=30),
)
OTHER_INPUTS = (
    Group("vgg-bn", "mnist", 9, 12, 3),
    Group("convnext", "fashion", 9, 12, 1),
    Group("mlp", "digits", 9, 48, 2),
)
LATER = (
    Group("dense", "fashion", 3, 12, 3),
    Group("textcnn", "packages", 3, 32, 1, steps=300),
    Group("gated", "mnist", 3, 32, 2, steps=300),
    Group("mobile", "fashion", 3, 16, 2, steps=300),
    Group("dense", "digits", 4, 16, 2),
    Group("textcnn", "modules", 4, 48, 2, steps=300),
    Group("gated", "fashion", 4, 24, 3, steps=300),
    Group("mobile", "mnist", 4, 12, 3, steps=300),
    Group("textcnn", "packages", 5, 48, 2, steps=300),
    Group("dense", "digits", 5, 12, 3),
    Group("textcnn", "modules", 5, 32, 1, steps=300),
    Group("gated", "digits", 5, 24, 2, steps=300),
    Group("mobile", "digits", 5, 12, 2, steps=300),
)
"""Families that predictor 6 was not fitted to."""
LATEST = (
    Group("grouped", "fashion", 3, 16, 2, steps=300),
    Group("pool", "mnist", 3, 32, 2, steps=300),
    Group("bag", "packages", 3, 32, 1, steps=300),
    Group("tanh", "noisy", 3, 48, 2, steps=300),
    Group("temporal", "modules", 3, 48, 2, steps=300),
    Group("grouped", "digits", 4, 24, 2, steps=200),
    Group("pool", "fashion", 4, 48, 3, steps=300),
    Group("bag", "modules", 4, 64, 2, steps=300),
    Group("tanh", "many", 4, 64, 1, steps=300),
    Group("temporal", "packages", 4, 32, 3, steps=300),
    Group("grouped", "mnist", 5, 16, 3, steps=300),
    Group("tanh", "tails", 5, 32, 3, steps=300),
    Group("pool", "digits", 5, 32, 1, steps=200),
)
"""Families, and data sets, that predictor 7 was not fitted to."""


def work() -> Iterator[Pair]:
    """All pairs, one of every group in turn; those of later families first."""
    for groups in (LATEST, LATER):
        yield from _in_turn([[p for p in pairs(g) if p.kind != "asymmetric"] for g in groups])
    yield from _in_turn(_earlier())


def _in_turn(lists: Sequence[Sequence[Pair]]) -> Iterator[Pair]:
    yield from (p for row in zip_longest(*lists) for p in row if p is not None)


def _earlier() -> list[list[Pair]]:
    return [
        *([p for p in pairs(g) if p.kind != "asymmetric"] for g in PLAIN),
        *(_low(g) for g in LOW),
        *([p for p in pairs(g) if p.kind in ("independent", "split", "scrambled")] for g in LARGE_RATES),
        *(_weak(g) for g in WEAK),
        *([Elsewhere(p.kind, f"{p.detail}, other inputs", p.a, p.b, p.scramble) for p in pairs(g)
           if p.kind != "asymmetric"] for g in OTHER_INPUTS),
    ]  # fmt: skip


def _low(group: Group) -> list[Pair]:
    """Fine-tunes of low rank of one base, on its own task and on others."""
    base = models(group)["A"]
    plain = {**{k: getattr(base, k) for k in ("group", "decay")}, "parent": base, "at": 1.0}
    made = [
        LowRank(role=f"L{k}", seed=40 + k, steps=group.steps, rate=2 * base.rate, task=task, **plain)
        for k, task in enumerate(("all", "all", "lower", "upper", "turned"))
    ]
    some = ((0, 1), (0, 2), (2, 3), (0, 4), (2, 4), (1, 3))
    return [
        *(Pair("low rank", f"{made[i].task}/{made[j].task}", made[i], made[j]) for i, j in some),
        Pair("low rank", "base", base, made[0]),
        Pair("low rank", "scrambled", made[0], made[1], "all"),
    ]


def _weak(group: Group) -> list[Pair]:
    """Networks after few steps, and two that have collapsed."""
    known = models(group)
    burnt = [
        replace(known["A"], role=f"C{k}", seed=50 + k, rate=BURNT * known["A"].rate, steps=60, decay=0.3)
        for k in (0, 1)
    ]
    some = [p for p in pairs(group) if p.kind in ("independent", "split", "fine-tunes")][:6]
    return [
        *some,
        Pair("collapsed", "one", known["A"], burnt[0]),
        Pair("collapsed", "both", burnt[0], burnt[1]),
    ]


def measure(zoo: WiderZoo, pair: Pair, out: Path) -> None:
    """One pair in all tables; the pair's own row comes last, so that a run that was stopped begins it again."""
    for net, model in zip(zoo.nets(pair), (pair.a, pair.b), strict=True):
        if not all(bool(v.isfinite().all()) for v in net.state_dict().values()):
            raise MergeidError(f"{model.id} has diverged: its weights are not finite, and no merge takes them")
    known = {r["model"] for r in table.read(out / "models.csv")}
    rows = {f: [r for r in table.read(out / f) if r["pair"] != pair.id] for f in ("features.csv", "midpoints.csv")}
    rows["features.csv"] += list(features.records(zoo, pair))  # type: ignore[arg-type]
    rows["midpoints.csv"].append(midpoints.measure(zoo, pair, datetime.date.today().isoformat()))
    row = zoo.measure(pair)
    made = table.read(out / "models.csv")
    for model in (pair.a, pair.b):
        if model.id not in known:
            size = sum(p.numel() for p in load(model, zoo.cache).parameters())
            file, optimizer = path(model, zoo.cache).relative_to(zoo.cache), FAMILIES[model.group.family].optimizer
            made.append(table.model_row(model, zoo.cache, size, file, optimizer))  # type: ignore[arg-type]
            known.add(model.id)
    table.write(out / "models.csv", table.MODEL_COLUMNS, made)
    features.write(out / "features.csv", rows["features.csv"])  # type: ignore[arg-type]
    table.write(out / "midpoints.csv", midpoints.COLUMNS, rows["midpoints.csv"])
    table.write(out / "pairs.csv", table.COLUMNS, [*table.read(out / "pairs.csv"), row])


def run(out: Path, cache: Path, only: str = "*", minutes: float = 9.0) -> int:
    """Measure what is not measured yet until time is up; the number of new pairs."""
    zoo, began, count = WiderZoo(cache), time.monotonic(), 0
    done = {r["pair"] for r in table.read(out / "pairs.csv")}
    for pair in work():
        if pair.id in done or not fnmatchcase(pair.id, only):
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        start = time.process_time()
        try:
            measure(zoo, pair, out)
        except MergeidError as error:
            print(f"{pair.id}: {error}", flush=True)
            continue
        count += 1
        print(f"{pair.id} ({pair.kind}, {pair.detail}) [{time.process_time() - start:.1f} s]", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "wider")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further pair after so many")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    run(options.out, options.cache, options.only, options.minutes)


if __name__ == "__main__":
    main()
