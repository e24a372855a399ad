"""Live modules whose own code computes different things of the same weights are told apart by running them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

import mergeid
from mergeid.errors import MergeidError
from mergeid.models.live import code_difference
from mergeid.models.load import load_model
from mergeid.request.request import Example, Reading, Run

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Settings that torch's own layers do not know of."""

    def __init__(
        self,
        heads: int = 2,
        act: Callable[[Tensor], Tensor] = relu,
        scale: float = 1.0,
        name: str = "",
        hidden: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.act, self.scale, self.name, self.dropout = heads, act, scale, name, 0.1
        self._hidden = [hidden]
        self.qkv, self.out, self.head = nn.Linear(6, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(n, t, 8)
        return self.head(self.act(self.out(mixed) + self._hidden[0]).mean(1))


def made(seed: int = 0, **settings: object) -> Attention:
    torch.manual_seed(seed)
    return Attention(**settings).eval()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 4}, r"heads \(2 and 4\)"),
        ({"act": gelu}, r"act \(relu and gelu\)"),
        ({"scale": 0.5, "name": "other"}, "scale"),
        ({"hidden": 1.0}, "their code"),
    ],
)
@pytest.mark.parametrize("verb", [mergeid.merge, mergeid.plan, mergeid.predict])
def test_what_code_computes_differently_is_refused(settings: dict, said: str, verb: Callable) -> None:
    expected = rf"differ in .*{said}.*, which changes what the network computes; --config a\|b says which"
    with pytest.raises(MergeidError, match=expected):
        verb(made(0), made(1, **settings), example_inputs=X)


@pytest.mark.parametrize("config", ["a", "b"])
def test_the_user_says_whose_code_counts(config: str) -> None:
    a, b = made(0), made(0, heads=4)
    state = mergeid.merge(a, b, example_inputs=X, config=config, match="always").state
    assert all(torch.equal(state[k], v) for k, v in a.state_dict().items())
    same = {"heads": 4} if config == "b" else {}
    data = list(torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(1)))  # on which either code is run
    wanted = mergeid.plan(made(0, **same), made(1, **same), example_inputs=X, data=data).spaces
    found = mergeid.plan(made(0), made(1, heads=4), example_inputs=X, data=data, config=config).spaces
    assert [(s.size, s.j_match) for s in found] == [(s.size, s.j_match) for s in wanted]


def test_names_are_no_difference() -> None:
    assert mergeid.plan(made(0), made(1, name="other"), example_inputs=X).spaces


class Writes(nn.Module):
    """Scales its inputs where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(3)
        return self.b(self.a(x).relu())


def test_inputs_are_as_they_were_for_every_pass() -> None:
    """Else B sees what A left of a batch, and so does the user."""
    torch.manual_seed(0)
    a, b, generator = Writes().eval(), Writes().eval(), torch.Generator().manual_seed(0)
    example, data = torch.randn(2, 6, generator=generator), [torch.randn(2, 6, generator=generator) for _ in range(24)]
    before = [x.clone() for x in (example, *data)]
    assert mergeid.graph(a, example).spaces
    plan = mergeid.plan(a, b, example_inputs=example, data=data)
    found = mergeid.merge(a, b, example_inputs=example, data=data, force=True)
    assert found.state and mergeid.predict(a, b, example_inputs=example, data=data).outlooks
    assert all(torch.equal(x, y) for x, y in zip((example, *data), before, strict=True))

    class Scaled(Writes):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(3 * x).relu())

    c, d = Scaled().eval(), Scaled().eval()
    c.load_state_dict(a.state_dict())
    d.load_state_dict(b.state_dict())
    same = mergeid.plan(c, d, example_inputs=example, data=data)
    assert [s.j_match for s in plan.spaces] == pytest.approx([s.j_match for s in same.spaces])


def test_modules_without_weights() -> None:
    with pytest.raises(MergeidError, match=r"ReLU .*have no floating-point weights; expected some to merge"):
        mergeid.merge(nn.ReLU(), nn.ReLU(), example_inputs=X)


class Embedded(nn.Module):
    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.e, self.f, self.o = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        if tied:
            self.o.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.f(self.e(x)).relu())


def test_a_head_of_its_own_is_not_held_by_a_tied_one() -> None:
    a, b, ids = Embedded(0, True).eval(), Embedded(1, False).eval(), torch.arange(8).view(2, 4)
    with pytest.raises(MergeidError, match=r"whether \w.weight is a tensor of its own \(false and true\)"):
        mergeid.merge(a, b, example_inputs=ids)
    state = mergeid.merge(a, b, example_inputs=ids, config="b", match="always", force=True).state
    assert not torch.equal(state["e.weight"], state["o.weight"])
    assert mergeid.plan(a, Embedded(1, True).eval(), example_inputs=ids).spaces


@pytest.mark.parametrize("match", ["never", "auto"])
def test_nothing_is_merged_on_the_meta_device(match: str) -> None:
    with torch.device("meta"):
        empty = Attention()
    with pytest.raises(MergeidError, match="of Attention is on the meta device and holds no values; load its weights"):
        mergeid.merge(empty, made(0), match=match, example_inputs=X)


class Noisy(nn.Module):
    """Differs from itself from pass to pass, by what torch's seed does not rule."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), kind
        self.own = torch.Generator()
        self.own.seed()

    def forward(self, x: Tensor) -> Tensor:
        noise = {
            "numpy": lambda: float(np.random.randn()),  # noqa: NPY002 - as models do it
            "python": random.random,
            "own generator": lambda: float(torch.randn((), generator=self.own)),
        }[self.kind]()
        return self.b(self.a(x).relu() * (1 + noise))


class Remembers(nn.Module):
    """Keeps what the last pass left, in a place of some kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), kind
        self.state, self.passes = torch.zeros(8), 0
        self.states = {"v": torch.zeros(8)}
        self.past: list[Tensor] = []
        self.register_buffer("held", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h, new = self.a(x), self.a(x).mean((0, 1)).detach()
        if self.kind == "attribute":
            h, self.state = h + self.state, new
        elif self.kind == "buffer":
            h, self.held = h + self.held, new
        elif self.kind == "dict":
            h, self.states["v"] = h + self.states["v"], new
        elif self.kind == "list":
            h = h + sum(self.past)
            self.past.append(new)
        else:
            self.passes += 1
            h = h * self.passes
        return self.b(h.relu())


@pytest.mark.parametrize("kind", ["numpy", "python", "own generator"])
def test_noise_is_no_code(kind: str) -> None:
    """Both were said to differ in their code."""
    a, b = (Noisy(kind).eval() for _ in range(2))
    assert code_difference(*(load_model(m, Reading(example=Example(X)), Run()) for m in (a, b))) is None


@pytest.mark.parametrize("run", [0, 1])
@pytest.mark.parametrize("kind", ["attribute", "buffer", "dict", "list", "number"])
def test_what_earlier_passes_left_is_no_code(kind: str, run: int) -> None:
    """A model that was run, as for its scores, and one that was not."""
    models = [Remembers(kind).eval() for _ in range(2)]
    for _ in range(3):
        models[run](X + 1)
    before = torch.cat([models[run].state, models[run].held, torch.tensor([models[run].passes])])
    assert mergeid.plan(*models, example_inputs=X).verdict
    assert torch.equal(before, torch.cat([models[run].state, models[run].held, torch.tensor([models[run].passes])]))


class Chosen(nn.Module):
    """Codes, of which rounding chooses others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 9)

    def forward(self, x: Tensor) -> Tensor:
        return (50 * self.b(self.a(x.to(self.a.weight.dtype)).relu())).round().float() % 7


@pytest.mark.parametrize("short", [0, 1])
def test_other_formats_are_no_code(short: int) -> None:
    torch.manual_seed(0)
    models = [Chosen().eval() for _ in range(2)]
    models[short].bfloat16()
    x = torch.randn(64, 5, 6)
    assert code_difference(*(load_model(m, Reading(example=Example(x)), Run()) for m in models)) is None


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_both_compiled() -> None:
    """A TypeError: torch gives what it compiled a length, which raises where the module has none."""
    a, b = (torch.compile(made(seed), backend="eager") for seed in range(2))
    assert mergeid.plan(a, b, example_inputs=X).spaces


def test_hooks_that_keep_outputs() -> None:
    """A RuntimeError: tensors with a gradient's graph cannot be copied."""
    a, b, kept = made(0), made(1), []
    a.out.register_forward_hook(lambda module, given, out: kept.append(out))
    a(X)
    assert mergeid.merge(a, b, example_inputs=X).state


@pytest.mark.parametrize("match", ["never", "auto"])
def test_sparse_buffers_are_named(match: str) -> None:
    """A NotImplementedError, page after page."""
    a, b = made(0), made(1)
    for m in (a, b):
        m.register_buffer("adjacency", torch.eye(3).to_sparse())
    with pytest.raises(MergeidError, match="tensor 'adjacency' of Attention is sparse; expected a dense one, or a"):
        mergeid.merge(a, b, example_inputs=X, match=match)
    for m in (a, b):
        m.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
    assert mergeid.merge(a, b, example_inputs=X, match=match).state
