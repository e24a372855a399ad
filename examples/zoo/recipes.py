"""What is trained and which pairs are measured, in an order in which a part already has something of everything."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from families import FAMILIES
from torch import nn

KINDS = ("independent", "split", "fine-tunes", "scrambled", "asymmetric")


@dataclass(frozen=True)
class Group:
    """Networks of one architecture on one data set; all pairs lie within a group.

    Attributes:
        index: of the group within its family; tasks, split points and settings turn with it.
        rate: multiple of the family's learning rate.
    """

    family: str
    data: str
    index: int
    width: int
    depth: int
    steps: int = 200
    rate: float = 1.0
    decay: float = 1e-4

    @property
    def name(self) -> str:
        return f"{self.family}.{self.data}.{self.width}x{self.depth}.{self.index}"


@dataclass(frozen=True)
class Model:
    """One trained network.

    Attributes:
        role: its name within the group.
        task: variant of the data that it is trained on (`tasks.VARIANTS`).
        seed: of its initial weights (without a parent) and of the order of its examples.
        rate: learning rate; decay: weight decay.
        sigma: W-asymmetric with fixed values of that standard deviation; None: an ordinary network.
        parent, at: what it was continued from, after that share of the parent's steps. At 1 it is fine-tuned on a
            schedule of its own, before that it follows the parent's schedule on other batches.
    """

    group: Group
    role: str
    seed: int
    steps: int
    rate: float
    decay: float
    task: str = "all"
    sigma: float | None = None
    parent: Model | None = None
    at: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.group.name}/{self.role}"

    @property
    def digest(self) -> int:
        """Of everything that decides the weights: settings never mix in a cache."""
        return zlib.crc32(repr(self).encode())

    def prepare(self, net: nn.Module) -> Callable[[], None]:
        """Changes what of a network is trained; what is returned puts it back into its usual form."""
        return lambda: None


@dataclass(frozen=True)
class Pair:
    """Two networks of one group.

    Attributes:
        kind: one of `KINDS`; detail: what precisely, for reading.
        scramble: "": B as it is; "all": B under a random element of its neuron graph; "some": only every other space.
    """

    kind: str
    detail: str
    a: Model
    b: Model
    scramble: str = ""

    @property
    def id(self) -> str:
        return f"{self.a.id}-{self.b.role}" + (f"*{self.scramble}" if self.scramble else "")


SPLITS = ((0.0, 0.03, 0.2), (0.01, 0.06, 0.3), (0.0, 0.02, 0.1))
FINE_TUNES = (("lower", "mixed"), ("lower", "upper"), ("upper", "turned"))
SIGMAS = (0.5, 1.0, 0.2)


def models(group: Group) -> dict[str, Model]:
    """The group's networks by role.

    A, B: independent seeds, B with another rate, decay and length. S1 to S3: split from A early to late. F1 to F4:
    fine-tunes of A, two on its own task and two on others, at a high rate. W0, W1: asymmetric, independent; W2: split
    from W0."""
    turn = group.index % 3
    rate, high = group.rate * FAMILIES[group.family].rate, 2.0 if group.index % 2 else 3.0
    plain = Model(group, "A", 1, group.steps, rate, group.decay)
    early, middle, late = SPLITS[turn]
    first, second = FINE_TUNES[turn]
    length = group.steps * (2, 1, 2)[turn] // 2
    tuned = replace(plain, steps=length, rate=rate * high, parent=plain, at=1.0)
    fixed = replace(plain, role="W0", seed=31, sigma=SIGMAS[turn])
    found = [
        plain,
        replace(
            plain,
            role="B",
            seed=2,
            steps=group.steps * (3, 2, 4)[turn] // 2,
            rate=rate * (1, 0.5, 1)[turn],
            decay=group.decay * (1, 1, 100)[turn],
        ),
        replace(plain, role="S1", seed=11, parent=plain, at=early),
        replace(plain, role="S2", seed=12, parent=plain, at=middle),
        replace(plain, role="S3", seed=13, parent=plain, at=late),
        replace(tuned, role="F1", seed=21),
        replace(tuned, role="F2", seed=22),
        replace(tuned, role="F3", seed=23, task=first),
        replace(tuned, role="F4", seed=24, task=second),
        fixed,
        replace(fixed, role="W1", seed=32),
        replace(fixed, role="W2", seed=33, parent=fixed, at=middle),
    ]
    return {m.role: m for m in found}


def snapshots(model: Model) -> list[float]:
    """Shares of a network's steps after which others split from it."""
    family = models(model.group).values()
    return sorted({m.at for m in family if m.parent is not None and m.parent.role == model.role and m.at < 1})


def pairs(group: Group) -> list[Pair]:
    """The group's pairs, the kinds in turn."""
    m = models(group)

    def of(kind: str, *rows: tuple[str, ...]) -> list[Pair]:
        return [Pair(kind, detail, m[a], m[b], *more) for detail, a, b, *more in rows]

    def tasks(a: str, b: str) -> str:
        return f"{m[a].task}/{m[b].task}"

    by_kind = (
        of(
            "split",
            *((f"at {m[r].at:g}", "A", r) for r in ("S2", "S1", "S3")),
            (f"at {m['S2'].at:g}, fine-tuned", "S2", "F1"),
            (f"at {m['S2'].at:g}", "S2", "S3"),
        ),
        of(
            "independent",
            ("seeds", "A", "B"),
            ("seeds, split", "S1", "B"),
            ("seeds, fine-tuned", "F1", "B"),
            ("seeds, split", "S2", "B"),
            ("seeds, fine-tuned", "F2", "B"),
            (f"seeds, fine-tuned ({m['F3'].task})", "F3", "B"),
        ),
        of(
            "fine-tunes",
            *((tasks(a, b), a, b) for a, b in (("F1", "F2"), ("A", "F1"), ("A", "F2"))),
            *((tasks(a, b), a, b) for a, b in (("F1", "F3"), ("F2", "F3"), ("F3", "F4"), ("F2", "F4"))),
        ),
        of(
            "scrambled",
            ("fine-tune", "A", "F1", "all"),
            ("split", "S1", "S2", "all"),
            ("split", "A", "S2", "some"),
            ("fine-tunes", "F1", "F2", "all"),
            ("fine-tunes", "F1", "F2", "some"),
            ("fine-tunes", "F2", "F3", "all"),
        ),
        of(
            "asymmetric",
            ("seeds", "W0", "W1"),
            ("seeds, scrambled", "W0", "W1", "all"),
            ("seeds, scrambled", "W0", "W1", "some"),
            (f"split at {m['W2'].at:g}", "W0", "W2"),
            ("seeds, split", "W2", "W1"),
        ),
        of(
            "split",
            (f"at {m['S1'].at:g}", "S1", "S2"),
            (f"at {m['S1'].at:g}, fine-tuned", "S1", "F1"),
            (f"at {m['S1'].at:g}, fine-tuned", "S1", "F2"),
            (f"at {m['S2'].at:g}, fine-tuned", "S2", "F2"),
            (f"at {m['S1'].at:g}", "S1", "S3"),
        ),
    )
    turns = [pair for row in zip_longest(*by_kind) for pair in row if pair is not None]
    # what needs no further network comes first
    return sorted(turns, key=lambda pair: max(_later(pair.a), _later(pair.b)))


def _later(model: Model) -> int:
    """0 for the networks that a group's first six pairs are made of."""
    return {"F3": 1, "W2": 1, "S3": 2, "F4": 2}.get(model.role, 0)


GROUPS = (
    Group("resnet-narrow", "fashion", 0, 12, 2, steps=300),
    Group("gpt", "code", 0, 32, 2),
    Group("mlp", "fashion", 0, 64, 3),
    Group("vit", "mnist", 0, 32, 2),
    Group("bert", "packages", 0, 32, 2),
    Group("vgg", "fashion", 0, 12, 3),
    Group("llama", "prose", 0, 32, 2),
    Group("resnet-wide", "mnist", 0, 32, 2),
    Group("vgg-bn", "digits", 0, 16, 3),
    Group("convnext", "fashion", 0, 12, 1, rate=2.0),
    Group("mixer", "fashion", 0, 32, 2, rate=2.0),
    Group("mlp", "digits", 1, 48, 2, rate=3.0),
    Group("bert", "modules", 1, 48, 2, rate=2.0),
    Group("gpt", "prose", 1, 48, 2, rate=2.0),
    Group("resnet-narrow", "mnist", 1, 8, 3),
    Group("vit", "fashion", 1, 48, 3, rate=2.0),
    Group("vgg", "mnist", 1, 16, 4, rate=2.0),
    Group("llama", "code", 1, 48, 2, rate=2.0),
    Group("resnet-wide", "fashion", 1, 40, 2),
    Group("vgg-bn", "fashion", 1, 12, 4),
    Group("convnext", "mnist", 1, 12, 2, rate=2.0),
    Group("mixer", "digits", 1, 24, 3, rate=2.0),
    Group("mlp", "mnist", 2, 128, 4, steps=400, rate=4.0),
    Group("resnet-narrow", "digits", 2, 10, 2),
    Group("vit", "digits", 2, 24, 2, steps=300, rate=1.5),
    Group("bert", "packages", 2, 24, 3, steps=300, rate=1.5),
    Group("gpt", "code", 2, 24, 3, steps=300, rate=1.5),
    Group("llama", "prose", 2, 24, 3, steps=300, rate=1.5),
)


def work() -> Iterator[Pair]:
    """All pairs: first of the first group of every family one of each kind, then more of these and of the next."""
    kinds = 6
    found = [(2 * g.index + k // kinds, g.index, pair) for g in GROUPS for k, pair in enumerate(pairs(g))]
    yield from (pair for _, _, pair in sorted(found, key=lambda item: item[:2]))
