"""What the experiments share: data, rows, averages and repairs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from networks import Images, ResNet, accuracy, fashion, kept, perceptron, run, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.evidence.taps import choose_taps
from mergeid.matchers import MatchTask, Training
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.repair.batchnorm import calibration_batches, reestimate_batchnorm
from mergeid.repair.rescale import output_moments, rescalable_layers, rescale

State = Mapping[str, Tensor]


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(batch["arg0"])


class Bench:
    """The data, the folder, and the rows so far."""

    def __init__(self, out: Path, data: Path) -> None:
        self.out, self.path = out, out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.train = fashion(data, "train", 8000)
        self.data = data
        self.test = fashion(data, "t10k", 2000)
        self.calibration = self.train.part(7000, 8000)

    @cached_property
    def held_out(self) -> Images:
        """Training images that no network saw, for choices."""
        return fashion(self.data, "train", 12000).part(8000, 12000)

    @cached_property
    def all_tests(self) -> Images:
        return fashion(self.data, "t10k", 10000)

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
