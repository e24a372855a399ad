"""What others look at: distances and cosines of weights, CKA, and metrics after Demystifying Mergeability (Zhou et al.
2026, arXiv:2601.22285), from which a linear predictor is made: norms, angles, overlap of singular subspaces,
activations, and gradients at each model's own weights. The published metrics are of task vectors from a common base;
pairs without one have the weights themselves in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from mergeid.prediction.features import Features
from mergeid.prediction.lockstep import watch

EXAMPLES = 128
COLUMNS = 1024
RANK = 8
"""Singular directions that are compared."""


def rival_features(a: nn.Module, b: nn.Module, forward: Callable[..., Tensor], data: Any) -> Features:
    """The metrics of one pair under one assignment.

    Args:
        data: labelled calibration examples; the gradients are those of the labels."""
    batch = default_collate([data[i * len(data) // EXAMPLES] for i in range(EXAMPLES)])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    found = [watch(m, forward, inputs) for m in (a, b)]
    layers = list(zip(*(seen for _, seen in found), strict=True))
    outs = [out.detach().flatten(1).double() for out, _ in found]
    gradients = [_gradient(m, forward, batch) for m in (a, b)]
    weights = [
        torch.cat([p.detach().double().flatten() for p in m.state_dict().values() if p.dim() >= 2]) for m in (a, b)
    ]
    overlaps = [_overlap(x, b.state_dict()[n]) for n, x in a.state_dict().items() if x.dim() >= 2]
    return {
        "rival_cka": _mean([cka(one.out, two.out) for one, two in layers if one.out.is_floating_point()]),
        "rival_cka_last": cka(outs[0], outs[1]),
        "rival_l2": float((weights[0] - weights[1]).norm()),
        "rival_dot": float(weights[0] @ weights[1]),
        "rival_angle": math.acos(max(-1.0, min(1.0, _cosine(*weights)))),
        "rival_ratio": float(weights[0].norm() / weights[1].norm()),
        "rival_left": _mean([o[0] for o in overlaps]),
        "rival_right": _mean([o[1] for o in overlaps]),
        "rival_rank": _mean([o[2] for o in overlaps]),
        "rival_out_l2": float((outs[0] - outs[1]).norm() / len(outs[0]) ** 0.5),
        "rival_out_cosine": _cosine(outs[0].flatten(), outs[1].flatten()),
        "rival_gradient_cosine": _cosine(*gradients),
        "rival_gradient_l2": float((gradients[0] - gradients[1]).norm()),
        "rival_gradient_dot": float(gradients[0] @ gradients[1]),
    }


def _gradient(model: nn.Module, forward: Callable[..., Tensor], batch: Any) -> Tensor:
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    out = forward(model, {k: v for k, v in batch.items() if k != "labels"})
    loss = F.cross_entropy(out.flatten(0, -2), batch["labels"].flatten())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.double().flatten() for g in found if g is not None])


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _cosine(x: Tensor, y: Tensor) -> float:
    below = float(x.norm() * y.norm())
    return float(x @ y) / below if below > 0 else 0.0


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA over examples (Kornblith et al. 2019), on `COLUMNS` evenly spaced columns where there are more."""
    centred = []
    for t in (x, y):
        t = t.flatten(1)
        t = t[:, :: -(-t.shape[1] // COLUMNS)].double()
        centred.append(t - t.mean(0))
    one, two = centred
    if len(one) <= max(one.shape[1], two.shape[1]):
        return _cosine((one @ one.T).flatten(), (two @ two.T).flatten())
    # the same by the smaller matrices
    below = float((one.T @ one).norm() * (two.T @ two).norm())
    return float((one.T @ two).square().sum()) / below if below > 0 else 0.0


def _overlap(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Overlap of the leading left and right singular subspaces, and the ratio of stable ranks."""
    parts = [torch.linalg.svd(t.flatten(1).double(), full_matrices=False) for t in (x, y)]
    k = min(RANK, len(parts[0][1]))
    left = float((parts[0][0][:, :k].T @ parts[1][0][:, :k]).square().sum()) / k
    right = float((parts[0][2][:k] @ parts[1][2][:k].T).square().sum()) / k
    ranks = [float(s.square().sum() / s[0].square().clamp(min=1e-12)) for _, s, _ in parts]
    return left, right, abs(math.log(ranks[0] / ranks[1])) if min(ranks) > 0 else 0.0
