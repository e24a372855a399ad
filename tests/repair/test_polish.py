"""Distillation of a merge: towards the mixture, never worse on the examples that judge, the same for a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mergeid.errors import MergeidError
from mergeid.models.running import make_accelerator
from mergeid.repair.polish import Aim, Polished, Schedule, polish_network, polished_again

SHORT = Schedule(rates=(1e-2, 1e-3), steps=40, every=10)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)).eval()


def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"out": model(batch["x"])}


X = torch.randn(120, 6, generator=torch.Generator().manual_seed(3))


def dealt(generator: Generator) -> list[dict[str, Tensor]]:
    return [{"x": x} for x in X[:80][torch.randperm(80, generator=generator)].split(20)]


def polished(merged: nn.Module, models: list[nn.Module], heads: set[str], seed: int = 0, **how: Any) -> Polished:
    aim = Aim(models, [1 / len(models)] * len(models), outputs, frozenset(heads))
    return polish_network(
        merged,
        aim,
        dealt,
        [{"x": X[80:]}],
        accelerator=make_accelerator("cpu"),
        schedule=replace(SHORT, seed=seed),
        **how,
    )


@pytest.mark.parametrize("heads", [{"out"}, set()])
def test_comes_nearer_on_examples_that_judge(heads: set[str]) -> None:
    a, b, merged = net(0), net(1), net(2)
    state = copy.deepcopy([m.state_dict() for m in (a, b)])
    found = polished(merged, [a, b], heads)
    assert found.after < 0.5 * found.before and sum(found.steps) > 0
    with torch.no_grad():
        if heads:
            p = (a(X[80:]).softmax(-1) + b(X[80:]).softmax(-1)) / 2
            own = (p * (p.log() - merged(X[80:]).log_softmax(-1))).sum(-1).mean()
        else:
            wanted = (a(X[80:]) + b(X[80:])) / 2
            everywhere = (a(X) + b(X)) / 2
            own = (merged(X[80:]) - wanted).square().mean() / everywhere.var(0, correction=0).mean()
    assert found.after == pytest.approx(float(own), rel=1e-5)
    assert not merged.training and all(p.requires_grad and p.grad is None for p in merged.parameters())
    for model, before in zip((a, b), state, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_steps_that_were_kept_taken_again() -> None:
    """On the same examples they lead to the same weights."""
    a, b, merged = net(0), net(1), net(2)
    again = copy.deepcopy(merged)
    found = polished(merged, [a, b], {"out"}, frozen=["1.bias"])
    assert found.steps[0] == SHORT.steps  # else the second round meets other batches than it did
    aim = Aim([a, b], [0.5, 0.5], outputs, frozenset({"out"}))
    polished_again(again, aim, dealt, found, accelerator=make_accelerator("cpu"), schedule=SHORT, frozen=["1.bias"])
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in again.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in again.parameters())


def test_small_steps_of_a_network_in_16_bits_add_up() -> None:
    """Each changes a weight by less than 16 bits tell apart; the rounds end where those in float32 do."""
    slow = Schedule(rates=(2e-4,), steps=80, every=80)
    moved = []
    for kind in (torch.float32, torch.bfloat16):
        a, b, merged = (net(k).bfloat16().to(kind) for k in range(3))
        before = {n: p.detach().float().clone() for n, p in merged.named_parameters()}
        aim = Aim([a, b], [0.5, 0.5], lambda m, batch: {"out": m(batch["x"].to(m[0].weight.dtype))}, frozenset({"out"}))
        polish_network(merged, aim, dealt, [{"x": X[80:]}], accelerator=make_accelerator("cpu"), schedule=slow)
        assert all(p.dtype == kind and p.grad is None for p in merged.parameters())
        moved.append(torch.cat([(p.detach().float() - before[n]).reshape(-1) for n, p in merged.named_parameters()]))
    cosine = torch.cosine_similarity(*moved, dim=0)
    assert cosine > 0.9 and 0.8 < moved[1].norm() / moved[0].norm() < 1.2


def test_what_is_perfect_stays() -> None:
    a = net(0)
    merged = copy.deepcopy(a)
    found = polished(merged, [a], {"out"})
    assert sum(found.steps) == 0 and found.before == found.after
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in merged.state_dict().items())


class Overwritten(nn.Module):
    """What its own backward pass needs is gone by then."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        return h.mul_(2)


class Deaf(Overwritten):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] * 2


@pytest.mark.parametrize("kind", [Overwritten, Deaf])
def test_a_network_that_cannot_be_trained_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(MergeidError, match=r"cannot be polished, because it cannot be trained .*--repair solve"):
        polished(kind().eval(), [kind().eval()], set())


def test_frozen_parameters_and_statistics_stay() -> None:
    merged = net(2)
    before = copy.deepcopy(merged.state_dict())
    polished(merged, [net(0)], {"out"}, frozen=["0.weight", "3.bias"])
    after = merged.state_dict()
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert same == {"0.weight", "3.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_the_seed_decides() -> None:
    states = []
    for seed in (0, 0, 1):
        merged = net(2)
        polished(merged, [net(0), net(1)], {"out"}, seed=seed)
        states.append(merged.state_dict()["0.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


class Shaped(nn.Module):
    """A network whose outputs are read in another way."""

    def __init__(self, seed: int, shape: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.net, self.shape = net(seed), shape

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.shape(self.net(x))


def reached(shape: Callable[[Tensor], dict[str, Tensor]], heads: set[str]) -> tuple[Polished, nn.Module]:
    models = [Shaped(k, shape) for k in range(3)]
    aim = Aim(models[:2], [0.5, 0.5], lambda m, batch: m(batch["x"]), frozenset(heads))
    done = polish_network(models[2], aim, dealt, [{"x": X[80:]}], accelerator=make_accelerator("cpu"), schedule=SHORT)
    return done, models[2]


def test_a_class_at_minus_infinity_is_polished_as_if_it_were_not_there() -> None:
    ruled_out = torch.tensor([False, True, False, False])
    found, merged = reached(lambda y: {"out": y.masked_fill(ruled_out, -torch.inf)}, {"out"})
    without, other = reached(lambda y: {"out": y[:, ~ruled_out]}, {"out"})
    assert found.after < 0.5 * found.before
    assert (found.before, found.after) == pytest.approx((without.before, without.after), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(merged(X)["out"][:, ~ruled_out], other(X)["out"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "more",
    [lambda y: y.square().mean(), lambda y: torch.full_like(y, 0.3) + 0 * y],
    ids=["of no example", "the same for all"],
)
def test_an_output_that_says_nothing_of_examples_is_left_out(more: Callable[[Tensor], Tensor]) -> None:
    found, _ = reached(lambda y: {"out": y, "more": more(y)}, {"out"})
    without, _ = reached(lambda y: {"out": y}, {"out"})
    assert found == without and found.after < 0.5 * found.before


def test_nothing_to_aim_at_moves_nothing() -> None:
    found, merged = reached(lambda y: {"more": y.square().mean()}, set())
    assert found == Polished(0.0, 0.0, ())
    assert all(torch.equal(v, Shaped(2, dict).state_dict()[k]) for k, v in merged.state_dict().items())


def test_complex_values_are_polished_like_their_two_parts() -> None:
    found, merged = reached(lambda y: {"out": torch.complex(y[:, :2], y[:, 2:])}, set())
    parts, other = reached(lambda y: {"out": y}, set())
    assert found.after < 0.5 * found.before
    assert (found.before, found.after) == pytest.approx((parts.before, parts.after), rel=1e-3)
    with torch.no_grad():
        z = merged(X)["out"]
        torch.testing.assert_close(torch.cat([z.real, z.imag], 1), other(X)["out"], atol=1e-3, rtol=1e-3)
