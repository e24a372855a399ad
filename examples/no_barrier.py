"""Two networks from independent seeds, merged into one that is about as good as they are, family by family.

    apt-get install dataset-fashion-mnist
    python examples/no_barrier.py --out no_barrier

trains pairs of small networks (timm's `test_*` and other small models on 12,000 Fashion-MNIST images, a Llama and a
BERT on Python's standard library), merges them at the midpoint in several ways with 512 unlabelled inputs, and writes
a table (table.md), the numbers (results.json) and a plot (losses.png): nats lost against the mean of the two networks.

- direct: the plain average; matched: after matching; repaired: BatchNorm re-estimated or REPAIR, where nearer;
- RegMean after the match, the best of three shares of the off-diagonal by the test data, which favours it. RegMean++
  takes every model's own inputs through the merged network; where all models have the same inputs it is the average
  itself, so that its column would be "matched";
- solved: what `merge --data` does by default; polished: `--repair solve+polish`;
- A distilled: the first network alone, trained towards both networks' mixture on the same inputs as long as the polish;
- ensemble: both networks run, their predictions averaged: the ceiling.

What is trained or measured is kept in the output folder: a second run goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidWarning
from mergeid.models.running import make_accelerator
from mergeid.repair.polish import Aim, polish_network

DATA = Path("/usr/share/datasets/fashion-mnist")
INPUTS, SEEDS = 512, (0, 1)
WAYS = ("direct", "matched", "repaired", "RegMean", "solved", "polished", "A distilled", "ensemble")
FAMILIES = (
    "test_resnet", "test_byobnet", "test_efficientnet_gn", "test_nfnet", "test_convnext", "test_mambaout", "test_vit",
    "mobilenetv3_small_050", "regnetx_002", "edgenext_xx_small", "ghostnet_050", "llama", "bert",
)  # fmt: skip
LINE, MASK = 64, 256
"""Bytes of a line of text; the token that hides a byte."""


@dataclass(frozen=True)
class Task:
    """Attributes:
    make: a fresh network. train, known, test: inputs and targets to learn from, to merge with, and to measure on.
    key: the network's keyword for its input; steps, rate: of AdamW.
    """

    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    known: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    key: str
    steps: int
    rate: float

    def logits(self, net: nn.Module, x: Tensor) -> Tensor:
        out = net(**{self.key: x})
        return out if isinstance(out, Tensor) else out.logits

    def examples(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Inputs without their targets; those with hidden bytes say which positions a model is asked about."""
        hidden = [{} if not (row == MASK).any() else {"labels": torch.where(row == MASK, 0, -100)} for row in x]
        return [{self.key: row, **more} for row, more in zip(x, hidden, strict=True)]

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-100)


def images(name: str, known: int = INPUTS) -> Task:
    import timm

    def read(split: str) -> tuple[Tensor, Tensor]:
        x, y = (
            np.frombuffer(gzip.decompress((DATA / f"{split}-{what}-ubyte.gz").read_bytes()), np.uint8, offset=skip)
            for what, skip in (("images-idx3", 16), ("labels-idx1", 8))
        )
        pixels = torch.from_numpy(x.reshape(-1, 1, 28, 28).copy()).float() / 255
        return F.pad((pixels - 0.286) / 0.353, (2, 2, 2, 2)), torch.from_numpy(y.copy()).long()

    sizes = {"img_size": 32, "patch_size": 4} if "vit" in name else {}
    (x, y), (u, v) = read("train"), read("t10k")
    parts = [(x[:12000], y[:12000]), (x[20000 : 20000 + known], y[20000 : 20000 + known]), (u[:2000], v[:2000])]
    return Task(lambda: timm.create_model(name, num_classes=10, in_chans=1, **sizes), *parts, "x", 400, 3e-3)


def text(name: str) -> Task:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 257, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    raw = np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)
    lines = torch.from_numpy(raw[: len(raw) // LINE * LINE].reshape(-1, LINE).copy()).long()
    lines = lines[torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))]

    def part(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if name == "llama":
            return x, torch.cat([x[:, 1:], torch.full_like(x[:, :1], -100)], 1)
        hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
        return torch.where(hidden, MASK, x), torch.where(hidden, x, -100)

    parts = [part(x, k) for k, x in enumerate((lines[2048:], lines[1024 : 1024 + INPUTS], lines[:512]))]
    if name == "llama":
        return Task(
            lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)), *parts, "input_ids", 900, 3e-3
        )
    return Task(lambda: BertForMaskedLM(BertConfig(**sizes, type_vocab_size=1)), *parts, "input_ids", 1600, 1e-3)


def trained(task: Task, name: str, seed: int, cache: Path) -> nn.Module:
    file = cache / f"{name}-{seed}.pt"
    torch.manual_seed(seed)
    net = task.make()
    if file.exists():
        net.load_state_dict(torch.load(file))
        return net.eval()
    x, y = task.train
    optimiser = torch.optim.AdamW(net.parameters(), task.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, task.rate, task.steps)
    for _, at in zip(range(task.steps), _order(len(x), 64 if x.is_floating_point() else 24, seed), strict=False):
        optimiser.zero_grad()
        task.loss(task.logits(net, x[at]), y[at]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    torch.save(net.state_dict(), file)
    return net.eval()


def _order(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (at for at in torch.randperm(count, generator=generator).split(size) if len(at) == size)


@torch.no_grad()
def measured(task: Task, *nets: nn.Module) -> float:
    """Loss in nats on the test data; of several networks that of their mean prediction."""
    total, count = 0.0, 0
    for x, y in zip(*(t.split(250) for t in task.test), strict=True):
        said = torch.stack([task.logits(net, x).softmax(-1) for net in nets]).mean(0).log()
        kept = int((y != -100).sum())
        total, count = total + float(task.loss(said, y)) * kept, count + kept
    return total / count


def midpoint(task: Task, way: str, a: nn.Module, b: nn.Module) -> float:
    """Loss of one way of making one network of two."""
    if way == "ensemble":
        return measured(task, a, b)
    x = task.known[0]
    if way == "A distilled":
        net = copy.deepcopy(a)
        judged = torch.arange(len(x)) % 4 == 3

        def dealt(generator: torch.Generator) -> list[dict[str, Tensor]]:
            own = x[~judged]
            return [{task.key: part} for part in own[torch.randperm(len(own), generator=generator)].split(32)]

        aim = Aim([a, b], [0.5, 0.5], lambda m, q: {"out": task.logits(m, q[task.key])}, frozenset(["out"]))
        unseen = [{task.key: part} for part in x[judged].split(32)]
        polish_network(net, aim, dealt, unseen, accelerator=make_accelerator("cpu"))
        return measured(task, net)
    how: dict[str, Any] = {
        "direct": {"match": "never", "repair": "none"},
        "matched": {"match": "always", "repair": "none"},
        "repaired": {"match": "always", "repair": "bn" if normed(a) else "repair"},
        "RegMean": {"match": "always", "repair": "none", "method": "regmean"},
        "solved": {},
        "polished": {"repair": "solve+polish"},
    }[way]
    tried = [{"parameters": {"alpha": s}} for s in (1.0, 0.9, 0.5)] if way == "RegMean" else [{}]
    losses = []
    for more in tried:
        losses.append(measured(task, merged(task, a, b, x, force=True, **how, **more)))
    return min(losses)


def merged(task: Task, a: nn.Module, b: nn.Module, x: Tensor, **how: Any) -> nn.Module:
    """What mergeid makes of two networks with these inputs. Raises `MergeidError` where it refuses."""
    net = copy.deepcopy(a)
    net.load_state_dict(mergeid.merge(a, b, data=task.examples(x), example_inputs={task.key: x[:2]}, **how).state)
    return net


def normed(net: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(("the two", *WAYS)) + " |", "|---" * (len(WAYS) + 2) + "|"]
    for name, found in results.items():
        cells = [f"{found[w] - found['ends']:+.3f}" if w in found else "" for w in WAYS]
        lines.append("| " + " | ".join((name, f"{found['ends']:.3f}", *cells)) + " |")
    done = [r for r in results.values() if all(w in r for w in WAYS)]
    if done:
        means = [f"{sum(r[w] - r['ends'] for r in done) / len(done):+.3f}" for w in WAYS]
        lines.append("| " + " | ".join((f"mean of {len(done)}", "", *means)) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    for k, way in enumerate(WAYS):
        known = [(i, r[way] - r["ends"]) for i, r in enumerate(results.values()) if way in r]
        axes.bar([i + (k - len(WAYS) / 2) / (len(WAYS) + 2) for i, _ in known], [v for _, v in known],
                 1 / (len(WAYS) + 2), label=way)  # fmt: skip
    axes.set_xticks(range(len(results)), list(results), rotation=20)
    axes.set_ylabel("nats above the two networks")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend(ncols=4, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def begun(folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The file of results, and what an earlier run has written to it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MergeidWarning)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    return file, json.loads(file.read_text()) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("no_barrier"))
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these")
    options = parser.parse_args()
    file, results = begun(options.out)
    for name in options.family or FAMILIES:
        task = text(name) if name in ("llama", "bert") else images(name)
        a, b = (trained(task, name, seed, options.out) for seed in SEEDS)
        found = results.setdefault(name, {})
        if "ends" not in found:
            found["ends"] = (measured(task, a) + measured(task, b)) / 2
        for way in WAYS:
            if way not in found:
                found[way] = midpoint(task, way, a, b)
                print(f"{name} {way}: {found[way] - found['ends']:+.3f}", flush=True)
                file.write_text(json.dumps(results, indent=1))
                (options.out / "table.md").write_text(table(results))
    plot(results, options.out / "losses.png")
    print(table(results))


if __name__ == "__main__":
    main()
