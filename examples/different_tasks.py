"""Two networks for different tasks, trained apart, merged into one that does both.

    apt-get install dataset-fashion-mnist
    python examples/different_tasks.py --out different_tasks

trains pairs of small networks on Fashion-MNIST, A on the first five classes and B on the others, merges them with 1,024
or 64 unlabelled inputs (half of each task's), and writes table.md with two accuracies of every merged network: on its
*own* task (the right one of that task's five classes) and *joint* (the right one of all ten).

- alone: each network on its own task, the ceiling; ensemble: the mean of both networks' predictions;
- matched: the average after matching; ZipIt!: `mergeid zip`, where the family can be zipped (both heads are kept);
- mean, own: `merge --data a=…,b=… --repair solve --target mean` or `own`;
- distilled: A alone, trained on the same inputs towards each input's own model, the better of two rates on held-out
  inputs; its seconds stand beside those of the merges.

What is trained or measured is kept in the output folder: a second run goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from no_barrier import Task, begun, images, trained
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid.errors import MergeidError

FAMILIES = ("test_resnet", "test_convnext", "test_vit")
HALVES = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
COUNTS = (1024, 64)
RATES, STEPS = (1e-3, 3e-3), 400


def of(half: list[int], part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    mine = torch.isin(part[1], torch.tensor(half))
    return part[0][mine], part[1][mine]


def pair(name: str, cache: Path) -> tuple[Task, list[nn.Module]]:
    """The task with all ten classes, and a network for each half of them."""
    task = images(name, known=4096)
    nets = []
    for k, half in enumerate(HALVES):
        own = Task(task.make, of(half, task.train), task.known, task.test, task.key, task.steps, task.rate)
        nets.append(trained(own, f"{name}-half", k, cache))
    return task, nets


@torch.no_grad()
def accuracies(task: Task, logits: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """On its own task, and among all classes. `logits`: of a batch, [examples, 10]."""
    own = joint = 0
    for x, y in zip(*(t.split(250) for t in task.test), strict=True):
        out = logits(x)
        joint += int((out.argmax(1) == y).sum())
        first = (y < len(HALVES[0]))[:, None]
        mine = torch.arange(10) < len(HALVES[0])
        own += int((out.masked_fill(torch.where(first, ~mine, mine), -torch.inf).argmax(1) == y).sum())
    return own / len(task.test[1]), joint / len(task.test[1])


def distilled(task: Task, nets: list[nn.Module], inputs: list[Tensor]) -> nn.Module:
    """A, trained towards what each input's own model says of it; every fourth input chooses the rate and the step."""
    x = torch.cat(inputs)
    with torch.no_grad():
        said = torch.cat([net(part).softmax(-1) for net, part in zip(nets, inputs, strict=True)])
    judged = torch.arange(len(x)) % 4 == 3
    best, kept = float("inf"), copy.deepcopy(nets[0])
    for rate in RATES:
        net = copy.deepcopy(nets[0])
        optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        generator, at = torch.Generator().manual_seed(0), torch.where(~judged)[0]
        for step in range(STEPS):
            some = at[torch.randperm(len(at), generator=generator)[:32]]
            optimiser.zero_grad()
            F.kl_div(net(x[some]).log_softmax(-1), said[some], reduction="batchmean").backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            cosine.step()
            if step % 20 == 19:
                with torch.no_grad():
                    now = float(F.kl_div(net(x[judged]).log_softmax(-1), said[judged], reduction="batchmean"))
                if now < best:
                    best, kept = now, copy.deepcopy(net)
    return kept


def made(task: Task, nets: list[nn.Module], way: str, inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The logits of one way of making one network of two."""
    if way == "alone":  # as if somebody said of every example which network to ask
        return lambda x: torch.cat([net(x)[:, half] for net, half in zip(nets, HALVES, strict=True)], 1)
    if way == "ensemble":
        return lambda x: torch.stack([net(x).softmax(-1) for net in nets]).mean(0).log()
    if way == "distilled":
        return distilled(task, nets, inputs)
    data = {k: [{task.key: row} for row in part] for k, part in zip("ab", inputs, strict=True)}
    how: dict[str, Any] = {"data": data, "example_inputs": {task.key: inputs[0][:2]}, "force": True, "limit": None}
    if way == "ZipIt!":
        together = [row for rows in zip(data["a"], data["b"], strict=True) for row in rows]
        zipped = mergeid.zip_models(*nets, data=together, limit=None, example_inputs=how["example_inputs"])
        found = [copy.deepcopy(net) for net in nets]
        for net, state in zip(found, zipped.states, strict=True):
            net.load_state_dict(state)
        return lambda x: torch.cat([n(x)[:, half] for n, half in zip(found, HALVES, strict=True)], 1)
    more = {"match": "always", "repair": "bn"} if way == "matched" else {"repair": "solve", "target": way}
    net = copy.deepcopy(nets[0])
    net.load_state_dict(mergeid.merge(*nets, **how, **more).state)
    return net


WAYS = (("alone", COUNTS[:1]), ("ensemble", COUNTS[:1]), ("matched", COUNTS[:1]), ("ZipIt!", COUNTS), ("mean", COUNTS),
        ("own", COUNTS), ("distilled", COUNTS))  # fmt: skip


def table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| | " + " | ".join(f"{n}: own | joint | s" for n in results) + " |",
        "|---" * (3 * len(results) + 1) + "|",
    ]
    for way, counts in WAYS:
        for count in counts:
            cells = [results[n].get(f"{way} {count}") for n in results]
            said = ["– | – | –" if not c else f"{c[0]:.3f} | {c[1]:.3f} | {c[2]:.0f}" for c in cells]
            lines.append(f"| {way}{f', {count:,}' if len(counts) > 1 else ''} | " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("different_tasks"))
    options = parser.parse_args()
    file, results = begun(options.out)
    for name in FAMILIES:
        task, nets = pair(name, options.out)
        found = results.setdefault(name, {})
        for way, counts in WAYS:
            for count in counts:
                if f"{way} {count}" in found:
                    continue
                inputs = [of(half, task.known)[0][: count // 2] for half in HALVES]
                began = time.process_time()
                try:
                    logits = made(task, nets, way, inputs)
                    found[f"{way} {count}"] = [*accuracies(task, logits), time.process_time() - began]
                except MergeidError as error:
                    print(f"{name} {way}: {error}")
                    found[f"{way} {count}"] = []
                print(f"{name} {way} {count}: {found[f'{way} {count}']}", flush=True)
                file.write_text(json.dumps(results, indent=1))
                (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
