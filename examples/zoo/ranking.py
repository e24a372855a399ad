"""Does `mergeid rank` find the best partner? Fifty fine-tunes of one base, every merge measured: ranking.csv.

    python examples/zoo/ranking.py --minutes 9           # goes on where it was stopped; what it says: ranking.md

Fine-tunes of each base differ in seed, rate, length, and task; some are harmful (a rate far too large) and some have
hardly moved. For a few of them `mergeid rank` puts the others in order, by unlabelled inputs of the model's own task,
without data, and with trials; and every merge that it names is made and measured on the test set of that task.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pairs_table as table
import ranking_report
import torch
from baselines import cka
from build import HERE, Zoo
from families import FAMILIES
from measuring import PairOfNets
from recipes import Group, Model, models
from tasks import Examples, calibration, test
from torch import Tensor, nn
from training import load, logits, scores, state
from wider import LowRank

import mergeid
from mergeid.basics.state import load_weights
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.results.ranking import Partner, Ranking
from mergeid.stages.repair import SOLVE, repair_merged

FILE = "ranking.csv"
FULL = (
    Group("mlp", "fashion", 20, 64, 2, steps=600),
    Group("vit", "mnist", 20, 32, 1, steps=600),
    Group("resnet-narrow", "mnist", 20, 8, 2),
    Group("bert", "packages", 20, 32, 1, steps=600),
    Group("llama", "prose", 20, 32, 1, steps=600),
    Group("vgg", "digits", 20, 8, 2, steps=300),
)
"""Bases that are fine-tuned as a whole."""
LOW = (
    Group("mlp", "mnist", 21, 64, 2, steps=600),
    Group("vit", "fashion", 21, 32, 1, steps=600),
    Group("mixer", "digits", 21, 24, 1, steps=400),
    Group("bert", "modules", 21, 32, 1, steps=600),
    Group("llama", "code", 21, 32, 1, steps=600),
    Group("gpt", "prose", 21, 32, 1, steps=600),
)
"""Bases that get adapters of low rank."""
CANDIDATES = 50
ASKED = 4
"""Fine-tunes of a base that partners are looked for."""
TASKS = ("all", "lower", "turned", "all", "mixed", "upper", "all", "low", "high", "mixed")
RATES = (1.0, 0.3, 2.0, 0.1, 4.0, 1.0, 12.0)
STEPS = (30, 60, 15, 50, 5)
"""Of the fine-tunes in turn."""
LENGTH = 60
"""Steps of those that partners are looked for."""
HARMFUL, EVERY = 60.0, 12
"""Every so many fine-tunes one has so many times the rate."""
TEST = 2000
"""Test examples that merges are measured on, at most."""
MODES = ("inputs", "weights", "trial")
OF_MODE = ("place", "way", "beyond", "expected", "score", "trusted", "loss")
COLUMNS = (
    *("base", "family", "data", "tuning", "model", "task", "candidate", "candidate_task", "rate", "steps"),
    *("loss_model", "loss_candidate", "loss_direct"),
    *(f"{mode}_{name}" for mode in MODES for name in OF_MODE),
    *("trial_lost", "cosine", "distance", "cka"),
    *(f"seconds_{mode}" for mode in MODES),
)


class Logits(nn.Module):
    """A network of any library as a live module that answers with logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.net(x))


def fine_tunes(group: Group, low: bool) -> list[Model]:
    """Of the group's base. The first `ASKED` are ordinary ones of several tasks, whose partners are looked for."""
    base = models(group)["A"]
    made = []
    for k in range(ASKED + CANDIDATES):
        task = TASKS[k % len(TASKS)]
        steps = LENGTH if k < ASKED else STEPS[k % len(STEPS)]
        times = 1.0 if k < ASKED else HARMFUL if k % EVERY == EVERY - 1 else RATES[k % len(RATES)]
        role, rate = f"R{k:02d}", times * (2.0 if low else 1.0) * base.rate
        plain = replace(base, role=role, seed=100 + k, steps=steps, rate=rate, task=task, parent=base, at=1.0)
        made.append(LowRank(**{n: getattr(plain, n) for n in plain.__dataclass_fields__}) if low else plain)
    return made


def work() -> Iterator[tuple[Model, list[Model]]]:
    """(model, its candidates), every base in turn."""
    known = [(fine_tunes(g, low)) for low, groups in ((False, FULL), (True, LOW)) for g in groups]
    known = [known[i // 2 + (i % 2) * len(FULL)] for i in range(len(known))]
    for k in range(ASKED):
        for tuned in known:
            others = [m for i, m in enumerate(tuned) if i != k]
            yield tuned[k], others[:CANDIDATES]


class Case:
    """One model and its candidates."""

    def __init__(self, zoo: Zoo, model: Model, candidates: Sequence[Model]) -> None:
        self.zoo, self.model, self.candidates = zoo, model, candidates
        data, task = model.group.data, (model.task, model.task)
        self.held, self.known = Examples(test(data, task).at(slice(TEST))), Examples(calibration(data, task))
        self.net = load(model, zoo.cache)
        self.nets = {c.role: load(c, zoo.cache) for c in candidates}
        self.unlabelled = [{"arg0": x} for x in self.known.part.x]

    def ranked(self, mode: str) -> dict[str, tuple[int, Partner]]:
        """role -> place and what is said of it."""
        sources = [Logits(n) for n in (self.net, *self.nets.values())]
        found = mergeid.rank(
            sources,
            data=None if mode == "weights" else self.unlabelled,
            trial=mode == "trial",
            example_inputs=self.known.part.x[:2],
        )
        assert isinstance(found, Ranking)
        roles = {f"model {i + 2}": role for i, role in enumerate(self.nets)}
        return {roles[p.name]: (k, p) for k, p in enumerate(found.partners, 1)}

    def loss(self, net: nn.Module) -> float:
        """On the test set of the model's task, nats."""
        with torch.no_grad():
            return float(scores(logits(net.eval()(self.held.part.x)), self.held.part.labels)[0].mean())


def nearest(partner: Partner) -> float:
    """What partners were ranked by before: the lowest loss against the mean of both models, before it is cut off."""
    known = partner.result.outlooks
    return min(o.nats.score for o in [o for o in known if o.nats.trusted] or known)


class Merges:
    """Merges of a model and a candidate, each made once, and their test losses."""

    def __init__(self, case: Case, role: str) -> None:
        self.case = case
        group = case.model.group
        graph, repair = case.zoo.graph(case.model), FAMILIES[group.family].repair
        self.nets = PairOfNets(case.net, case.nets[role], graph, repair, case.held, case.known)
        self.losses: dict[str, float] = {}

    def loss(self, way: str) -> float:
        """Of one that is called as `mergeid.results.prediction.Outlook` calls it, nats."""
        if way not in self.losses:
            self.losses[way] = self._loss(way)
        return self.losses[way]

    def _loss(self, way: str) -> float:
        nets, known = self.nets, self.case.known
        if way == "solved":
            members = nets._members(nets.planned(known), known)
            net = load(self.case.model, self.case.zoo.cache)
            load_weights(net, {**members.merged_state(), **repair_merged(members, mode=SOLVE).tensors})
            return self.case.loss(net)
        merge, _, repaired = way.partition(", ")
        b = nets.state_b(nets.graph.identity() if merge == "direct" else nets.always(known))
        return float(nets.at(b, 0.5, nets.repairer(b, known) if repaired else None)[0].mean())


def rivals(case: Case, role: str, base: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine of the task vectors, distance of the networks, and CKA of their outputs on the calibration inputs."""
    a, b = (n.state_dict() for n in (case.net, case.nets[role]))
    names = [n for n, p in case.net.named_parameters() if p.is_floating_point()]
    one, two = (torch.cat([(s[n] - base[n]).double().flatten() for n in names]) for s in (a, b))
    with torch.no_grad():
        outs = [logits(n(case.known.part.x)) for n in (case.net, case.nets[role])]
    return {
        "cosine": float(one @ two / (one.norm() * two.norm()).clamp(min=1e-12)),
        "distance": float((one - two).norm()),
        "cka": cka(*outs),
    }


def measure(zoo: Zoo, model: Model, candidates: Sequence[Model], modes: Sequence[str]) -> list[table.Row]:
    """One row per candidate."""
    case, said, seconds = Case(zoo, model, candidates), {}, {}
    for mode in modes:
        began = time.process_time()
        said[mode] = case.ranked(mode)
        seconds[f"seconds_{mode}"] = round(time.process_time() - began, 1)
    assert model.parent is not None
    base, own = state(model.parent, zoo.cache), case.loss(case.net)
    rows = []
    for c in candidates:
        merges = Merges(case, c.role)
        row: dict[str, object] = {
            **{"base": model.group.name, "family": model.group.family, "data": model.group.data},
            **{"tuning": "low rank" if isinstance(model, LowRank) else "full", "model": model.role},
            **{"task": model.task, "candidate": c.role, "candidate_task": c.task, "rate": c.rate, "steps": c.steps},
            **{"loss_model": own, "loss_candidate": case.loss(case.nets[c.role]), "loss_direct": merges.loss("direct")},
            **rivals(case, c.role, base),
            **seconds,
        }
        for mode, ranked in said.items():
            place, p = ranked[c.role]
            nats = p.way.nats
            values = (place, p.label, p.beyond, nats.expected, nearest(p), int(nats.trusted))
            row |= {f"{mode}_{n}": v for n, v in zip(OF_MODE, (*values, merges.loss(p.label)), strict=True)}
            if p.tried is not None:
                row["trial_lost"] = p.tried
        rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
    return rows


def run(out: Path, cache: Path, only: str = "*", minutes: float = 9.0, modes: Sequence[str] = MODES[:2]) -> int:
    """Rank and measure what is not there yet until time is up; the number of new models."""
    zoo, rows, began, count = Zoo(cache), table.read(out / FILE), time.monotonic(), 0
    done = {(r["base"], r["model"]) for r in rows}
    for model, candidates in work():
        if (model.group.name, model.role) in done or not fnmatchcase(model.id, only):
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        start = time.process_time()
        try:
            new = measure(zoo, model, candidates, modes)
        except MergeidError as error:
            print(f"{model.id}: {error}", flush=True)
            continue
        rows += new
        table.write(out / FILE, COLUMNS, rows)
        count += 1
        print(f"{model.id}: {len(new)} candidates [{time.process_time() - start:.1f} s]", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help=f"folder of {FILE}")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--only", default="*", metavar="GLOB", help="models whose id matches")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further model after so many")
    parser.add_argument("--try", dest="trial", action="store_true", help="rank with trials as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    run(options.out, options.cache, options.only, options.minutes, MODES if options.trial else MODES[:2])
    ranking_report.write(options.out)


if __name__ == "__main__":
    main()
