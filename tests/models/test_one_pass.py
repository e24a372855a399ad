"""A batch says nothing of the next one: recurrent states that a module keeps start anew with every pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.basics.untouched import one_pass

N = 8


class Stateful(nn.Module):
    """A recurrent layer, and where its state stays between passes."""

    def __init__(self, seed: int, keep: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.keep = nn.Linear(6, N), nn.Linear(N, N), nn.Linear(N, 3), keep
        self.last: Tensor | None = None
        self._memories: dict[str, Tensor] = {}
        self.register_buffer("level", torch.zeros(1, N))

    def forward(self, x: Tensor) -> Tensor:
        before = {"attribute": self.last, "dict": self._memories.get("h"), "buffer": self.level}.get(self.keep)
        inner = self.a(x) if before is None else self.a(x) + self.b(before.mean(0, keepdim=True).to(x))
        h = torch.tanh(inner)
        if self.keep == "attribute":
            self.last = h.detach()
        elif self.keep == "dict":
            self._memories["h"] = h.detach()
        elif self.keep == "replaced buffer":
            self.level = h.detach().mean(0, keepdim=True)
        else:
            self.level.copy_(h.detach().mean(0, keepdim=True))
        return self.c(h)


KEPT = ["attribute", "dict", "buffer"]
DATA = [{"x": row} for row in torch.randn(48, 6, generator=torch.Generator().manual_seed(3))]
X = {"x": torch.stack([d["x"] for d in DATA[:5]])}


@pytest.mark.parametrize("keep", KEPT)
def test_its_neurons_are_found(keep: str) -> None:
    graph = mergeid.graph(Stateful(0, keep).eval(), X)
    assert [s.size for s in graph.spaces] == [N] and graph.verified


@pytest.mark.parametrize("keep", KEPT)
def test_what_is_found_depends_on_no_batch_size(keep: str) -> None:
    def found(batch_size: int) -> Any:
        nets = [Stateful(seed, keep).eval() for seed in (0, 1)]
        plan = mergeid.plan(*nets, data=DATA, example_inputs=X, batch_size=batch_size)
        return plan.to_json()["spaces"]

    one, other = found(7), found(48)
    assert len(one) == len(other) == 1

    def numbers(value: Any) -> list[float]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [float(value)] if isinstance(value, (int, float)) else [n for part in parts for n in numbers(part)]

    assert numbers(one) == pytest.approx(numbers(other), rel=1e-3, abs=1e-4)


CHANGES: dict[str, Callable[[Any], None]] = {
    "another tensor": lambda m: setattr(m, "last", torch.ones(2, N)),
    "in place": lambda m: m.level.add_(1),
    "a key": lambda m: m._memories.update(h=torch.ones(1)),
    "another buffer": lambda m: setattr(m, "level", torch.ones(1, N)),
    "a new attribute": lambda m: setattr(m, "other", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_pass_leaves_nothing(name: str) -> None:
    model = Stateful(0, "attribute").eval()
    level = model.level
    with one_pass(model):
        CHANGES[name](model)
    assert model.last is None and model._memories == {} and not hasattr(model, "other")
    assert model.level is level and not level.any()


def test_results_in_that_memory_stay() -> None:
    model = Stateful(0, "buffer").eval()
    with one_pass(model) as lasting:
        result = lasting(model.level.add_(1))
    assert bool((result == 1).all()) and not model.level.any()


def test_statistics_that_are_estimated_stay() -> None:
    model = nn.Sequential(nn.Linear(6, N), nn.BatchNorm1d(N))
    with one_pass(model.train()):
        model(torch.randn(9, 6))
    assert model[1].num_batches_tracked == 1 and model[1].running_mean.any()


def test_tables_that_shorten_their_rows_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, N, max_norm=1.0), nn.Flatten(), nn.Linear(2 * N, 3)).eval()
    before = model[0].weight.clone()
    graph = mergeid.graph(model, torch.arange(8).view(4, 2))
    assert torch.equal(model[0].weight, before)
    assert [s.size for s in graph.spaces if s.axes] != [] and not graph.unknown_ops
    assert any((a.tensor, a.axis) == ("0.weight", 1) for s in graph.spaces for a in s.axes)


class Noisy(nn.Module):
    """Draws noise in every pass, as a variational autoencoder does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.mean, self.spread, self.c = nn.Linear(6, N), nn.Linear(N, 4), nn.Linear(N, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        mean = self.mean(h)
        return self.c(mean + torch.randn_like(mean) * self.spread(h).exp())


def test_models_that_draw_noise_draw_the_same() -> None:
    """Else two passes of one model are as far apart as its noise is large, and it "will not merge" with itself."""
    a, x = Noisy(0).eval(), torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    result = mergeid.merge(a, Noisy(0).eval(), example_inputs=x[:4], data=[(v,) for v in x])
    assert all(torch.equal(result.state[k], v) for k, v in a.state_dict().items())
    state = torch.get_rng_state()
    with one_pass(a):
        first = a(x)
    with one_pass(a):
        assert torch.equal(a(x), first)
    assert torch.equal(torch.get_rng_state(), state)
