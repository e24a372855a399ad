"""What a polish aims at, beside naive loops over examples and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeid.repair.polish import Aim


class Says(nn.Module):
    """The same whatever it is given."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        self.values = values


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def aim(models: list[Says], shares: list[float]) -> Aim:
    def outputs(model: Any, batch: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = model.values
        return found

    return Aim(models, shares, outputs, frozenset({"logits"}))


def test_models_say_the_weighted_mean_of_probabilities_and_of_values() -> None:
    models = [Says(logits=drawn(3, 4, seed=k), value=drawn(3, 2, seed=9 + k)) for k in range(2)]
    said = aim(models, [0.25, 0.75]).said({})
    chances = [m.values["logits"].softmax(-1) for m in models]
    torch.testing.assert_close(said["logits"], 0.25 * chances[0] + 0.75 * chances[1])
    torch.testing.assert_close(said["value"], 0.25 * models[0].values["value"] + 0.75 * models[1].values["value"])


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_of_a_head_is_the_divergence_of_every_real_token(masked: bool) -> None:
    teacher, student = Says(logits=drawn(2, 5, 4, seed=0)), Says(logits=drawn(2, 5, 4, seed=1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"attention_mask": mask} if masked else {}
    found = aim([teacher], [1.0])
    p, q = (m.values["logits"].double().softmax(-1) for m in (teacher, student))
    each = [
        sum(float(p[i, t, c]) * math.log(float(p[i, t, c] / q[i, t, c])) for c in range(4))
        for i in range(2)
        for t in range(5)
        if mask[i, t] or not masked
    ]
    loss = found.loss(student, batch, found.said(batch))
    assert float(loss) == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_the_loss_of_values_is_their_error_over_the_spread_and_outputs_add_up() -> None:
    teacher, student = (Says(value=drawn(6, 3, seed=k), other=drawn(6, seed=5 + k)) for k in range(2))
    found = aim([teacher], [1.0])
    found.measure([{}])
    terms = []
    for name in ("value", "other"):
        wanted, out = teacher.values[name], student.values[name]
        terms.append(float((out - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()))
    assert float(found.loss(student, {}, found.said({}))) == pytest.approx(sum(terms), rel=1e-5)
    assert float(found.loss(teacher, {}, found.said({}))) == 0


@pytest.mark.parametrize("name", ["logits", "value"])
def test_what_padding_holds_counts_nothing(name: str) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    losses = []
    for padding in (0.0, torch.nan):
        values = [drawn(2, 5, 4, seed=k).masked_fill(mask[..., None] == 0, padding) for k in range(2)]
        teacher, student = (Says(**{name: v.requires_grad_()}) for v in values)
        found, batch = aim([teacher], [1.0]), {"attention_mask": mask}
        found.measure([batch])
        loss = found.loss(student, batch, found.said(batch))
        (slope,) = torch.autograd.grad(loss, values[1])
        assert bool(slope.isfinite().all()) and not bool(slope[mask == 0].any())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[0] > 0


def test_the_spread_is_that_of_all_examples_however_they_are_dealt_out() -> None:
    values = 3 + drawn(12, 2, seed=0)
    values[6:] += 5  # each half alone varies much less

    def outputs(model: Any, batch: Any) -> dict[str, Tensor]:
        return {"value": values[batch["at"]] + (0 if model is teacher else 1)}

    teacher, student = nn.Identity(), nn.Identity()
    for size in (12, 6, 1):
        batches = [{"at": at} for at in torch.arange(12).split(size)]
        found = Aim([teacher], [1.0], outputs, frozenset())
        found.measure(batches)
        for batch in batches:
            loss = float(found.loss(student, batch, found.said(batch)))
            assert loss == pytest.approx(float(1 / values.var(0, correction=0).mean()), rel=1e-5)
