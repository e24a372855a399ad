"""What every method of the field says of itself, on small networks and Fashion-MNIST: one table.

    python examples/methods/reproduce.py [--out FOLDER] [--data FOLDER]

trains what is missing (checkpoints lie in --out), measures what is missing (one line of results.json per row), and
writes the table to table.md beside this file. Accuracy is on 2,000 test images; BatchNorm statistics are estimated
again on 1,000 training images without labels wherever weights were merged, but for the row that says what this does.
A few minutes on one core. Data: ``apt-get install dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid.graph.neuron_graph import Element, NeuronGraph
from mergeid.identify.activations import PairStream, TapReader, choose_taps
from mergeid.identify.evidence import ActivationEvidence
from mergeid.match import MatchTask, Training, WeightSimilarity, get_matcher, weight_matching
from mergeid.match.cycle import cycle_matching, relative
from mergeid.match.transport import transport, transported
from mergeid.match.weight import good_start
from mergeid.match.widths import transport_widths
from mergeid.merge.repair import calibration_batches, reestimate_batchnorm
from mergeid.merge.rescale import output_moments, rescalable_layers, rescale
from mergeid.merge.zip import joint_correlations, spaces_up_to, zip_models

sys.path.insert(0, str(Path(__file__).parent))
from networks import Images, ResNet, accuracy, fashion, kept, perceptron, run, seeded

TABLE = Path(__file__).parent / "table.md"
State = Mapping[str, Tensor]
MATCHERS = ("weight", "layerwise", "activation", "combined", "ot", "sinkhorn", "cycle", "straight_through")
HALVES = (range(5), range(5, 10))


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(batch["arg0"])


class Bench:
    """The data, the folder, and the rows so far."""

    def __init__(self, out: Path, data: Path) -> None:
        self.out, self.path = out, out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.train = fashion(data, "train", 8000)
        self.test = fashion(data, "t10k", 2000)
        self.calibration = self.train.part(7000, 8000)

    def row(self, key: str, measure: Callable[[], Mapping[str, float]]) -> None:
        if key not in self.rows:
            self.rows[key] = {k: round(float(v), 4) for k, v in measure().items()}
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.rows, indent=1))
            partial.replace(self.path)
            print(key, self.rows[key], flush=True)

    def network(self, kind: str, seed: int) -> nn.Module:
        make, epochs = (perceptron, 8) if kind == "perceptron" else (ResNet, 4)
        path = self.out / f"{kind}-{seed}.safetensors"
        return kept(path, seeded(make, seed), self.train, seed=seed, epochs=epochs)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        for x, y in zip(self.calibration.x.split(100), self.calibration.y.split(100), strict=True):
            yield {"arg0": x, "labels": y}

    def normalised(self, model: nn.Module) -> nn.Module:
        """BatchNorm statistics estimated again, in place."""
        found = calibration_batches(model, self.calibration, forward=forward, size=500)
        reestimate_batchnorm(model, found, forward=forward)
        return model

    def score(self, model: nn.Module, test: Images | None = None) -> dict[str, float]:
        images = test or self.test
        logits = run(model, images.x)
        return {"accuracy": accuracy(logits, images.y), "loss": float(F.cross_entropy(logits, images.y))}


def with_state(model: nn.Module, state: State) -> nn.Module:
    out = copy.deepcopy(model)
    out.load_state_dict(dict(state))
    return out


def middle(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    shares = weights or [1 / len(states)] * len(states)
    return {
        k: sum(w * s[k].double() for w, s in zip(shares, states, strict=True)).to(v.dtype)  # type: ignore[union-attr]
        if v.is_floating_point()
        else v
        for k, v in states[0].items()
    }


def task_of(bench: Bench, graph: NeuronGraph, a: nn.Module, b: nn.Module) -> MatchTask:
    taps = choose_taps(graph, a)
    flat = [t for found in taps.values() for t in found]
    stream = PairStream(TapReader(a, forward, flat), TapReader(b, forward, flat), bench.batches)
    evidence = ActivationEvidence(graph, stream, taps)
    evidence.collect()
    training = Training(a, forward, lambda out, batch: F.cross_entropy(out, batch["labels"]), bench.batches)
    generator = torch.Generator().manual_seed(0)
    return MatchTask(graph, a.state_dict(), b.state_dict(), generator, evidence.correlations(), training)


def repaired(bench: Bench, merged: nn.Module, ends: Sequence[nn.Module]) -> nn.Module:
    """REPAIR: the mean and spread of every layer as the networks have them on average."""
    batches = list(bench.batches())
    layers = rescalable_layers(merged, batches[0], forward=forward)
    found = [output_moments(m, layers, batches, forward=forward) for m in ends]
    targets = {
        layer.name: (
            torch.stack([f[layer.name].mean for f in found]).mean(0),
            torch.stack([f[layer.name].std for f in found]).mean(0),
        )
        for layer in layers
    }
    rescale(merged, layers, targets, batches, forward=forward)
    return merged


def two_seeds(bench: Bench, kind: str) -> None:
    """Git Re-Basin, OT fusion, Sinkhorn re-basin, FedMA's layer-wise matching, C2M3, REPAIR: the midpoint of two
    networks that were trained apart."""
    a, b = bench.network(kind, 0), bench.network(kind, 1)
    states = a.state_dict(), b.state_dict()

    def midpoint(moved: State, plain: bool = False) -> nn.Module:
        model = with_state(a, middle([states[0], moved]))
        return model if plain else bench.normalised(model)

    def ensemble() -> dict[str, float]:
        logits = torch.stack([run(m, bench.test.x).log_softmax(1) for m in (a, b)]).logsumexp(0) - np.log(2)
        return {"accuracy": accuracy(logits, bench.test.y), "loss": float(F.nll_loss(logits, bench.test.y))}

    bench.row(f"{kind}/network A", lambda: bench.score(a))
    bench.row(f"{kind}/network B", lambda: bench.score(b))
    bench.row(f"{kind}/ensemble", ensemble)
    bench.row(f"{kind}/average as they lie", lambda: bench.score(midpoint(states[1])))
    wanted = [f"{kind}/{m}" for m in (*MATCHERS, "activation, REPAIR", "ot, soft")]
    if all(key in bench.rows for key in wanted):
        return
    graph = mergeid.graph(a, bench.test.x[:2])
    task = task_of(bench, graph, a, b)
    for name in MATCHERS:
        bench.row(
            f"{kind}/{name}",
            lambda name=name: bench.score(midpoint(graph.apply_state(get_matcher(name).match(task), states[1]))),
        )
    bench.row(f"{kind}/ot, soft", lambda: bench.score(midpoint(transported(graph, transport(task), states[1]))))
    moved = graph.apply_state(get_matcher("activation").match(task), states[1])
    if kind == "perceptron":
        ends = [a, with_state(a, moved)]
        bench.row(
            f"{kind}/as they lie, REPAIR", lambda: bench.score(repaired(bench, midpoint(states[1], plain=True), [a, b]))
        )
        bench.row(f"{kind}/activation, REPAIR", lambda: bench.score(repaired(bench, midpoint(moved, plain=True), ends)))
    else:
        bench.row(f"{kind}/activation, statistics averaged", lambda: bench.score(midpoint(moved, plain=True)))


def disjoint(bench: Bench) -> None:
    """ZipIt!: two ResNets trained on classes 0 to 4 and 5 to 9. Accuracy of each head on its own task, and over all ten
    classes with the logits side by side."""
    models = tuple(
        kept(
            bench.out / f"resnet-half-{s}.safetensors",
            seeded(ResNet, s, classes=5),
            bench.train.of(classes),
            seed=s,
            epochs=4,
        )
        for s, classes in enumerate(HALVES)
    )
    graph = mergeid.graph(models[0], bench.test.x[:2])
    pair = (models[0], models[1])

    def score(heads: Sequence[nn.Module]) -> dict[str, float]:
        logits = [run(m, bench.test.x) for m in heads]
        own = [accuracy(run(m, t.x), t.y) for m, t in zip(heads, map(bench.test.of, HALVES), strict=True)]
        return {"accuracy": sum(own) / 2, "joint": accuracy(torch.cat(logits, 1), bench.test.y)}

    def both(states: Sequence[State]) -> list[nn.Module]:
        return [bench.normalised(with_state(m, s)) for m, s in zip(pair, states, strict=True)]

    bench.row("zip/each network on its own task (ceiling)", lambda: score(pair))
    found = joint_correlations(graph, pair, forward, bench.batches)
    trunk = zip_models(graph, pair, found).trunk

    def averaged(moved: State) -> list[nn.Module]:
        """One trunk, two heads."""
        a = pair[0].state_dict()
        shared = middle([a, moved])
        return both([{k: shared[k] if k in trunk else s[k] for k in a} for s in (a, moved)])

    bench.row("zip/average as they lie", lambda: score(averaged(pair[1].state_dict())))
    bench.row(
        "zip/activation matching",
        lambda: score(
            averaged(
                graph.apply_state(get_matcher("activation").match(task_of(bench, graph, *pair)), pair[1].state_dict())
            )
        ),
    )
    for name, until in (("all layers", "block3"), ("up to block 2", "block2"), ("up to block 1", "block1")):
        for within in (True, False):
            what = "ZipIt!" if within else "zip across models only"
            bench.row(
                f"zip/{what}, {name}",
                lambda until=until, within=within: score(
                    both(
                        zip_models(graph, pair, found, spaces=spaces_up_to(graph, pair[0], until), within=within).states
                    )
                ),
            )


def widths(bench: Bench) -> None:
    """OT fusion of a perceptron of width 256 with one of width 384."""
    a = bench.network("perceptron", 0)
    b = kept(bench.out / "perceptron-wide.safetensors", seeded(perceptron, 7, width=384), bench.train, seed=7, epochs=8)
    bench.row("widths/network A, 256 wide", lambda: bench.score(a))
    bench.row("widths/network B, 384 wide", lambda: bench.score(b))
    keys = ("widths/B's first 256 neurons of every layer, averaged", "widths/OT fusion")
    if all(k in bench.rows for k in keys):
        return
    graphs = tuple(mergeid.graph(m, bench.test.x[:2]) for m in (a, b))
    state = a.state_dict()
    cut = {k: v[tuple(slice(0, n) for n in state[k].shape)] for k, v in b.state_dict().items()}
    bench.row(keys[0], lambda: bench.score(with_state(a, middle([state, cut]))))
    bench.row(
        keys[1],
        lambda: bench.score(with_state(a, middle([state, transport_widths((graphs[0], graphs[1]), (a, b))]))),
    )


def fine_tunes(bench: Bench) -> None:
    """Merge methods: one base, fine-tuned on classes 0 to 4 and on 5 to 9, merged without matching."""
    base = kept(bench.out / "base.safetensors", seeded(perceptron, 3), bench.train.part(0, 800), seed=3, epochs=4)
    tuned = []
    for s, classes in enumerate(HALVES):
        keep = (bench.train.y >= classes.start) & (bench.train.y < classes.stop)
        part = Images(bench.train.x[keep], bench.train.y[keep])
        path = bench.out / f"tuned-{s}.safetensors"
        tuned.append(kept(path, copy.deepcopy(base), part, seed=s, epochs=3, rate=3e-4))

    def halves(model: nn.Module) -> dict[str, float]:
        own = []
        for classes in HALVES:
            keep = (bench.test.y >= classes.start) & (bench.test.y < classes.stop)
            logits = run(model, bench.test.x[keep])[:, classes.start : classes.stop]
            own.append(accuracy(logits, bench.test.y[keep] - classes.start))
        return {"accuracy": bench.score(model)["accuracy"], "own task": sum(own) / 2}

    bench.row("fine-tunes/base", lambda: halves(base))
    for name, model in zip(("classes 0 to 4", "classes 5 to 9"), tuned, strict=True):
        bench.row(f"fine-tunes/fine-tuned on {name}", lambda model=model: halves(model))
    methods: dict[str, dict[str, Any]] = {
        "linear": {},
        "slerp": {},
        "karcher": {},
        "task_arithmetic": {"lambda": 0.8, "normalize": False},
        "ties": {"density": 0.3, "lambda": 1.0},
        "dare_linear": {"density": 0.2, "lambda": 0.8},
        "dare_ties": {"density": 0.2, "lambda": 1.0},
        "model_stock": {},
        "fisher": {},
        "regmean": {},
    }
    for name, parameters in methods.items():
        takes_base = name in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")

        def merged(
            name: str = name, parameters: dict[str, Any] = parameters, takes_base: bool = takes_base
        ) -> dict[str, float]:
            sums = name in ("task_arithmetic", "dare_linear")  # of task vectors, not their mean
            result = mergeid.merge(
                tuned,
                base=base if takes_base else None,
                method=name,
                parameters=parameters,
                weights=[1.0, 1.0] if sums else None,
                match="never",
                data=bench.calibration if name in ("fisher", "regmean") else None,
                example_inputs=bench.test.x[:2],
            )
            assert result.state is not None
            return halves(with_state(base, result.state))

        bench.row(f"fine-tunes/{name}", merged)


def five(bench: Bench) -> None:
    """C2M3: five perceptrons merged in one common order, beside sequences of pairwise merges (each next network matched
    to the average so far), over 24 of the 120 orders."""
    keys = ["five/mean of the five", "five/average as they lie", "five/matched to the first", "five/cycle-consistent"]
    if all(k in bench.rows for k in (*keys, "five/best of 24 sequences, chosen on these images")):
        return
    models = [bench.network("perceptron", s) for s in range(5)]
    states = [m.state_dict() for m in models]
    graph = mergeid.graph(models[0], bench.test.x[:2])

    def score(found: Sequence[State]) -> dict[str, float]:
        return bench.score(with_state(models[0], middle(found)))

    each = [bench.score(m) for m in models]
    bench.row(keys[0], lambda: {k: sum(e[k] for e in each) / 5 for k in each[0]})
    bench.row(keys[1], lambda: score(states))

    def onto(target: State, other: State) -> dict[str, Tensor]:
        pair = WeightSimilarity(graph, target, other)
        generator = torch.Generator().manual_seed(0)
        return graph.apply_state(weight_matching(pair, generator=generator, element=good_start(pair)), other)

    bench.row(keys[2], lambda: score([states[0], *(onto(states[0], s) for s in states[1:])]))

    def consistent() -> dict[str, float]:
        universe = cycle_matching(graph, states, generator=torch.Generator().manual_seed(0))
        closed: Element = graph.identity()
        for p, q in itertools.pairwise((0, 3, 1, 4, 2, 0)):
            step = relative(universe, p, q)
            closed = {k: step[k][closed[k]] for k in closed}
        assert all((p == np.arange(len(p))).all() for p in closed.values())
        return score([graph.apply_state(relative(universe, 0, q), s) for q, s in enumerate(states)])

    bench.row(keys[3], consistent)

    def sequence(order: Sequence[int]) -> dict[str, float]:
        so_far: dict[str, Tensor] = dict(states[order[0]])
        for i, k in enumerate(order[1:], start=1):
            so_far = middle([so_far, onto(so_far, states[k])], [i / (i + 1), 1 / (i + 1)])
        return score([so_far])

    orders = list(itertools.permutations(range(5)))
    random.Random(0).shuffle(orders)
    found = [sequence(order) for order in orders[:24]]
    bench.row(
        "five/best of 24 sequences, chosen on these images",
        lambda: max(found, key=lambda r: (r["accuracy"], -r["loss"])),
    )
    bench.row("five/mean of 24 sequences", lambda: {k: sum(r[k] for r in found) / len(found) for k in found[0]})


TITLES = {
    "perceptron": "Two perceptrons (3 x 256) from independent seeds, midpoint",
    "resnet": "Two ResNets (width 32) from independent seeds, midpoint, BatchNorm statistics estimated again",
    "zip": "Two ResNets trained on disjoint classes, one trunk and two heads",
    "widths": "Two perceptrons of different widths, midpoint",
    "fine-tunes": "Two fine-tunes of one perceptron on disjoint classes, merge methods",
    "five": "Five perceptrons (3 x 256) from independent seeds, all merged with equal shares",
}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    parts = ["Made by `python examples/methods/reproduce.py`.\n"]
    for section, title in TITLES.items():
        mine = {k.partition("/")[2]: v for k, v in rows.items() if k.startswith(f"{section}/")}
        if not mine:
            continue
        columns = list(dict.fromkeys(c for v in mine.values() for c in v))
        parts.append(f"**{title}**\n")
        parts.append("\n".join([f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]))
        for name, values in mine.items():
            cells = [
                f"{values[c]:.2f}" if c == "loss" else f"{100 * values[c]:.1f} %" if c in values else ""
                for c in columns
            ]
            parts[-1] += f"\n| {name} | {' | '.join(cells)} |"
        parts[-1] += "\n"
    return "\n".join(parts)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "perceptron": lambda bench: two_seeds(bench, "perceptron"),
    "fine-tunes": fine_tunes,
    "widths": widths,
    "five": five,
    "zip": disjoint,
    "resnet": lambda bench: two_seeds(bench, "resnet"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("methods"))
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    bench = Bench(arguments.out, arguments.data)
    for name in arguments.only:
        SECTIONS[name](bench)
    arguments.table.write_text(table(bench.rows))


if __name__ == "__main__":
    main()
