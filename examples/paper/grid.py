"""What is trained and measured, in an order in which a part of the run already says something about everything."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from train import Budget, Setting

MLP_VARIANTS = ("standard", "W 0", "W 0.5", "W 1", "W 2", "SYRE 0.1", "SYRE 1")
RESNET_VARIANTS = ("standard", "W 2", "SYRE 1")
DIMENSIONS = (2, 8, 32)
TURNS = (0.0, 0.25, 0.5, 1.0)
EXPERIMENTS = ("mnist", "fashion", "resnet", "dimension", "coherence")


def settings(experiment: str, tiny: bool = False) -> list[Setting]:
    """The cells of one experiment; `tiny` shrinks them to seconds, to try the machinery."""

    def cell(data: str, net: str, variant: str, budget: Budget) -> Setting:
        small = Budget(images=192, epochs=1, width=8 if net == "resnet" else 16, test=64, batch=64)
        return Setting(experiment, data, net, variant, small if tiny else budget)

    mlp = {"mnist": Budget(4000, 10, 512, 1000, rate=3e-3), "fashion": Budget(6000, 7, 512, 2000, rate=3e-3)}
    if experiment in mlp:
        return [cell(experiment, "mlp", v, mlp[experiment]) for v in MLP_VARIANTS]
    if experiment == "resnet":
        budget = Budget(6000, 5, 24, 1000, rate=2e-3)
        return [cell("fashion", "resnet", v, budget) for v in RESNET_VARIANTS]
    budget = Budget(4000, 8, 256, 2000)
    if experiment == "dimension":
        return [cell(f"gauss-{k}", "mlp", v, budget) for v in ("standard", "W 1") for k in DIMENSIONS]
    return [cell(f"gauss-8-{turn:g}", "mlp", "W 1", budget) for turn in TURNS]


def pairs(seeds: int) -> Iterator[tuple[int, int]]:
    """All pairs of seeds, those of early seeds first."""
    yield from sorted(combinations(range(seeds), 2), key=lambda pair: (pair[1], pair[0]))


def work(experiments: list[str], seeds: int, tiny: bool = False) -> list[tuple[Setting, tuple[int, int]]]:
    """Everything that is to be measured: for the first pair of seeds all cells, then for the next pair, ….

    Every experiment has its turn before any has its next pair."""
    return [
        (setting, pair) for pair in pairs(seeds) for experiment in experiments for setting in settings(experiment, tiny)
    ]
