"""What a caller gives is kept: skipped tensors, number formats, weights by tensor, training modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid

X = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
DATA = [{"x": x, "labels": torch.tensor(0)} for x in X]
EXAMPLE = {"x": X[:2], "labels": torch.zeros(2, dtype=torch.long)}


class Plain(nn.Module):
    """Keeps what its last pass in training computed, as losses of experts are."""

    def __init__(self, seed: int, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity()
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.hidden(x)))
        if self.training:
            self.aux, self.seen = h.square().mean(), {"hidden": [h]}
        return self.out(h)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embed(x))))


class Spectral(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.filter, self.out = nn.Parameter(torch.randn(4, dtype=torch.complex64)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))


def merged(a: nn.Module, b: nn.Module, **how: Any) -> dict[str, Tensor]:
    found = mergeid.merge(a, b, data=DATA, example_inputs=EXAMPLE, match="never", force=True, **how)
    assert found.state is not None
    return dict(found.state)


@pytest.mark.parametrize("repair", ["none", "bn", "repair", "regmean", "solve", "solve+polish"])
def test_no_repair_touches_what_is_skipped(repair: str) -> None:
    a, b = (Plain(seed, norm=True) for seed in range(2))
    for net in (a, b):
        net(2 * X + 1)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    state = merged(a, b, repair=repair, skip=["hidden.*", "norm.running_mean"])
    kept = {"hidden.weight", "hidden.bias", "norm.running_mean"}
    assert all(torch.equal(state[k], before[k]) for k in kept)
    assert not torch.equal(state["out.weight"], before["out.weight"])


@pytest.mark.parametrize("repair", ["none", "solve", "solve+polish"])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_tensor_is_skipped_under_each_of_its_names(name: str, repair: str) -> None:
    a, b = Tied(0), Tied(1)
    tokens = torch.randint(0, 20, (128, 5), generator=torch.Generator().manual_seed(0))
    data = [{"x": t} for t in tokens]
    found = mergeid.merge(
        a, b, data=data, example_inputs={"x": tokens[:2]}, match="never", force=True, skip=[name], repair=repair
    )
    assert found.state is not None
    assert torch.equal(found.state["embed.weight"], a.embed.weight)
    assert torch.equal(found.state["head.weight"], a.embed.weight)
    assert not torch.equal(found.state["hidden.weight"], a.hidden.weight)


@pytest.mark.parametrize("repair", ["none", "solve", "solve+lean"])
def test_weights_by_pattern_count_in_what_is_solved(repair: str) -> None:
    plain, by_pattern = (
        merged(Plain(0), Plain(1), repair=repair, weights=weights) for weights in ([0.9, 0.1], {"*": [0.9, 0.1]})
    )
    for key, value in plain.items():
        torch.testing.assert_close(by_pattern[key], value, msg=key)


def test_complex_parameters_are_averaged() -> None:
    a, b = Spectral(0), Spectral(1)
    found = mergeid.merge(a, b, example_inputs={"x": X[:2]}, match="never", force=True)
    assert found.state is not None
    torch.testing.assert_close(found.state["filter"], (a.filter + b.filter).detach() / 2)


def test_data_in_float32_suits_networks_in_bfloat16() -> None:
    pairs = [[Plain(seed).to(kind) for seed in range(2)] for kind in (torch.bfloat16, torch.float32)]
    plans = [mergeid.plan(*pair, data=DATA, example_inputs=EXAMPLE) for pair in pairs]
    assert [s.decision for s in plans[0].spaces] == [s.decision for s in plans[1].spaces]
    assert mergeid.predict(*pairs[0], data=DATA, example_inputs=EXAMPLE).outlooks
    assert all(v.dtype == torch.bfloat16 for v in merged(*pairs[0]).values())


@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_networks_in_two_number_formats(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (Plain(seed).to(kind) for seed, kind in enumerate(kinds))
    plan = mergeid.plan(a, b, data=DATA, example_inputs=EXAMPLE)
    wide = mergeid.plan(a.float(), b.float(), data=DATA, example_inputs=EXAMPLE)
    assert [s.decision for s in plan.spaces] == [s.decision for s in wide.spaces]
    assert all(v.dtype == kinds[0] for v in merged(a.to(kinds[0]), b.to(kinds[1])).values())


@pytest.mark.parametrize("match", ["never", "always"])
def test_a_barrier_ends_at_b_with_what_is_skipped_of_a(match: str) -> None:
    a, b = Plain(0), Plain(1)
    labels = torch.randint(0, 3, (len(X),), generator=torch.Generator().manual_seed(1))
    data = [{"x": x, "labels": y} for x, y in zip(X, labels, strict=True)]
    found = mergeid.barrier(
        a.eval(), b.eval(), data=data, points=2, match=match, example_inputs=EXAMPLE, skip=["out.*"], device="cpu"
    )
    with torch.no_grad():
        hidden = torch.relu(b.hidden(X))
        if match == "always":
            aligned = mergeid.merge(
                a, b, data=data, match="always", weights=[0, 1], skip=["out.*"], example_inputs=EXAMPLE,
                repair="none", force=True,
            ).state  # fmt: skip
            assert aligned is not None
            hidden = torch.relu(X @ aligned["hidden.weight"].T + aligned["hidden.bias"])
        losses = [nn.functional.cross_entropy(a.out(h), labels) for h in (torch.relu(a.hidden(X)), hidden)]
    assert list(found.losses) == pytest.approx([float(x) for x in losses], abs=1e-5)


def test_modules_stay_in_training_with_what_they_hold() -> None:
    a, b = Plain(0, norm=True), Plain(1, norm=True)
    for net in (a, b):
        net(X)
    b.norm.eval()
    mergeid.merge(a, b, data=DATA, example_inputs=EXAMPLE, force=True)
    mergeid.plan(a, b, example_inputs=EXAMPLE)
    assert all(m.training for m in a.modules())
    assert b.training and b.hidden.training and not b.norm.training
    assert a.aux.grad_fn is not None
