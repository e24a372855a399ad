"""Rows in an order that the weights chose say nothing of which neurons correspond."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mergeid

TOKENS, WIDTH, INNER, EXPERTS = 12, 8, 16, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Routed(nn.Module):
    """Tokens go to the expert that a router chooses, each expert takes its own, and the tokens go back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.last = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 5)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        flat = h.reshape(-1, WIDTH)
        share, chosen = self.router(flat).softmax(-1).max(-1)
        return self.last(h + self.sent(flat, share[:, None], chosen).reshape(h.shape)).mean(1)

    def sent(self, flat: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            at = torch.where(chosen == k)[0]
            out.index_add_(0, at, expert(flat[at]) * share[at])
        return out


class Masked(Routed):
    def sent(self, flat: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            out[chosen == k] = expert(flat[chosen == k]) * share[chosen == k]
        return out


class Sorted(Routed):
    """By expert, and back by the inverse order."""

    def sent(self, flat: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)
        rows, sizes = flat[order], torch.bincount(chosen, minlength=EXPERTS).tolist()
        done = [expert(part) for expert, part in zip(self.experts, rows.split(sizes), strict=True)]
        return torch.cat(done)[order.argsort()] * share


class Gathered(Routed):
    """The same, by `gather` and `scatter`."""

    def sent(self, flat: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)[:, None].expand_as(flat)
        rows, sizes = flat.gather(0, order), torch.bincount(chosen, minlength=EXPERTS).tolist()
        done = [expert(part) for expert, part in zip(self.experts, rows.split(sizes), strict=True)]
        return torch.zeros_like(flat).scatter(0, order, torch.cat(done)) * share


class Stacked(Routed):
    """All experts in two tensors; their neurons are seen where all rows pass one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)
        self.experts = nn.ModuleList([nn.ReLU()])

    def sent(self, flat: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)
        expert = chosen[order]
        inner = self.experts[0](torch.bmm(self.up[expert], flat[order][..., None]).squeeze(-1))
        done = torch.bmm(self.down[expert], inner[..., None]).squeeze(-1)
        return done[order.argsort()] * share


ROUTED = [Routed, Masked, Sorted, Gathered, Stacked]
IDS = torch.randint(32, (64, TOKENS), generator=torch.Generator().manual_seed(0))
DATA = [{"arg0": row} for row in IDS]


def made(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def tuned(model: nn.Module, apart: float) -> nn.Module:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p += apart * p.std() * torch.randn(p.shape, generator=generator)
    return other


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("scrambled", [False, True])
def test_fine_tunes_that_route_tokens_otherwise_correspond(kind: type[nn.Module], scrambled: bool) -> None:
    """Rows of the experts are tokens of their own choice, so that the same neurons seemed to be unlike."""
    a = made(kind)
    b = tuned(a, 0.5)
    choices = [m.router(m.embed(IDS)).argmax(-1) for m in (a, b)]
    assert (choices[0] != choices[1]).float().mean() > 0.05
    if scrambled:
        graph = mergeid.graph(a, IDS[:2])
        b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(2)), b.state_dict()))
    plan = mergeid.plan(a, b, example_inputs=IDS[:2], data=DATA)
    assert {d.decision for d in plan.spaces} <= ({"match", "direct"} if scrambled else {"direct"})


@pytest.mark.parametrize("kind", ROUTED)
def test_only_what_stands_in_the_routers_order_is_not_compared(kind: type[nn.Module]) -> None:
    read = {t.module for taps in mergeid.graph(made(kind), IDS[:2]).taps.values() for t in taps}
    assert not any(name.startswith("experts.") for name in read) and {"embed", "router", "last"} <= read


class Plain(nn.Module):
    """Embeds, takes what `take` takes, and goes on."""

    def __init__(self, take: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, 5)
        self.take = take

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.first(self.take(self.embed(ids), ids)).relu())


INPUTS_CHOOSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda h, ids: h,
    "the last token": lambda h, ids: h[torch.arange(len(h)), ids.argmax(-1)],
    "a mask of the inputs": lambda h, ids: h[ids > 3],
    "an order of the inputs": lambda h, ids: h.gather(1, ids.argsort(1)[..., None].expand_as(h)),
    "fixed places": lambda h, ids: h[:, [0, 2, 4]],
    "a window": lambda h, ids: h.index_select(1, torch.arange(TOKENS).roll(3)),
    "the order of the values": lambda h, ids: h.sort(1).values,
    "scores by hidden state": lambda h, ids: h * h.sum(-1).gather(1, h.sum(-1).argsort(1))[..., None],
    "a code book": lambda h, ids: h + h[:1, :3].detach()[0][ids % 3],
}


@pytest.mark.parametrize("name", INPUTS_CHOOSE)
def test_what_the_inputs_choose_is_compared(name: str) -> None:
    graph = mergeid.graph(made(lambda: Plain(INPUTS_CHOOSE[name])), IDS[:2])
    read = {t.module for taps in graph.taps.values() for t in taps}
    assert {"embed", "first", "last"} <= read
