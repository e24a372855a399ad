"""Training, once per network: a file in the cache is taken as it is."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import tasks
import torch
from families import FAMILIES, make
from recipes import Model, snapshots
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mergeid import nn as mnn

BATCH = 64
CLIP = 2.0
"""Largest norm of a gradient."""


def logits(output: Any) -> Tensor:
    """Of a network of any library."""
    return output if isinstance(output, Tensor) else output.logits


def scores(out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and share of right predictions, one per example (the mean over its characters)."""
    loss = F.cross_entropy(out.flatten(0, -2), labels.flatten(), reduction="none").view(len(labels), -1)
    right = (out.argmax(-1) == labels).view(len(labels), -1)
    return loss.double().mean(1), right.double().mean(1)


def path(model: Model, cache: Path, at: float = 1.0) -> Path:
    """The file of a trained network, or of what it was after a share `at` of its steps."""
    when = "" if at == 1 else f"@{at:g}"
    return cache / model.group.name / f"{model.role}{when}-{model.digest:08x}.safetensors"


def state(model: Model, cache: Path, at: float = 1.0) -> dict[str, Tensor]:
    """The weights of a network; it, and what it was continued from, is trained first where the cache lacks it."""
    file = path(model, cache, at)
    if not file.exists():
        _train(model, cache)
    return load_file(file)


def fresh(model: Model) -> nn.Module:
    """The network with its initial weights."""
    g = model.group
    return make(g.family, g.width, g.depth, tasks.shape(g.data), model.seed, model.sigma)


def load(model: Model, cache: Path) -> nn.Module:
    """The trained network in eval mode."""
    net = fresh(model)
    net.load_state_dict(state(model, cache))
    return net.eval()


def facts(model: Model, cache: Path) -> dict[str, float]:
    """Loss (nats) and accuracy of a trained network on its own task's test set, and CPU seconds of its training."""
    net, test = load(model, cache), tasks.test(model.group.data, (model.task, model.task))
    with safe_open(path(model, cache), "pt") as file, torch.no_grad():
        losses, right = scores(logits(net(test.x)), test.labels)
        seconds = json.loads(file.metadata()["facts"])["seconds"]
    return {"loss": float(losses.mean()), "accuracy": float(right.mean()), "seconds": seconds}


def _save(net: nn.Module, file: Path, **found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    tensors = {k: v.detach().clone().contiguous() for k, v in net.state_dict().items()}
    save_file(tensors, partial, metadata={"facts": json.dumps(found)})
    partial.replace(file)


def _rate(model: Model, step: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to 5 % of the rate."""
    warm = max(1, model.steps // 20)
    fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / model.steps))
    return model.rate * fall * min(1.0, (step + 1) / warm)


def _train(model: Model, cache: Path) -> None:
    began = time.process_time()
    net, first = fresh(model), 0
    if model.parent is not None:
        net.load_state_dict(state(model.parent, cache, model.at))
        first = 0 if model.at == 1 else round(model.at * model.parent.steps)
    part = tasks.train(model.group.data, model.task)
    kept = snapshots(model)
    finish = model.prepare(net)
    groups = mnn.decay_groups(net, model.decay)
    optimizer: torch.optim.Optimizer
    if FAMILIES[model.group.family].optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=model.rate, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=model.rate, fused=True)
    order = torch.Generator().manual_seed(model.seed)
    queue: list[Tensor] = []
    net.train()
    for step in range(first, model.steps):
        for at in (at for at in kept if round(at * model.steps) == step):
            _save(net, path(model, cache, at))
        if not queue:
            size = min(BATCH, len(part) // 4)
            queue = [i for i in torch.randperm(len(part), generator=order).split(size) if len(i) == size]
        index = queue.pop()
        for settings in optimizer.param_groups:
            settings["lr"] = _rate(model, step)
        out, labels = logits(net(part.x[index])), part.labels[index]
        loss = F.cross_entropy(out.flatten(0, -2), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
    finish()
    net.eval()
    _save(net, path(model, cache), seconds=round(time.process_time() - began, 1))
