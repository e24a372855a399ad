"""Networks from a small vocabulary of operations, each a list of steps that Hypothesis can draw and shrink.

A step is (operation, a, b, c): a picks the tensor, b and c whatever else there is to choose. Steps that do not fit
their tensor do nothing, so that every list is a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = tuple[str, int, int, int]
MOST = 1500
"""Elements of the largest tensor."""


class Network(nn.Module):
    """Runs the steps; the parameters come to be in the first pass."""

    def __init__(self, steps: Sequence[Step], example: Tensor) -> None:
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleDict()
        self.vectors = nn.ParameterDict()
        self.building = True
        self.used: list[nn.Module] = []
        with torch.no_grad():
            self(example.float())
        self.building = False

    def layer(self, key: str, make: Callable[[], nn.Module]) -> nn.Module:
        if self.building and key not in self.layers:
            self.layers[key] = make()
        self.used.append(self.layers[key])
        return self.layers[key]

    def vector(self, key: str, shape: Sequence[int]) -> Tensor:
        if self.building and key not in self.vectors:
            self.vectors[key] = nn.Parameter(torch.randn(*shape))
        return self.vectors[key]

    def walk(self, x: Tensor) -> list[Tensor]:
        """All tensors on the way."""
        have, self.used = [x], []
        for i, (name, a, b, c) in enumerate(self.steps):
            # mostly the last tensor
            x = have[-1] if a < 8 else have[-1 - (a - 7) % len(have)]
            new = OPERATIONS[name](self, f"s{i}", have, x, b, c)
            if new is not None and 0 < new.numel() <= MOST:
                have.append(new)
        return have

    def forward(self, x: Tensor) -> object:
        last = self.walk(x)[-1]
        if last.dim() < 2:
            return last
        return self.layer("out", lambda: nn.Linear(last.shape[-1], 2))(torch.tanh(last))


@dataclass
class Pair:
    """A container that PyTorch's own trees do not know."""

    first: object
    second: object


class Several(Network):
    """The same steps; it returns several of the tensors on the way, nested, with heads or bare.

    Args:
        returned: (which tensor, a head of so many outputs or none) for every output.
        nest: how they are packed.
    """

    def __init__(
        self, steps: Sequence[Step], example: Tensor, returned: Sequence[tuple[int, int]], nest: int = 0
    ) -> None:
        self.returned, self.nest = list(returned), nest
        super().__init__(steps, example)

    def forward(self, x: Tensor) -> object:
        have = self.walk(x)
        outs = []
        for i, (which, width) in enumerate(self.returned):
            y = have[-1 - which % len(have)]
            if width and y.dim():
                y = self.layer(f"out{i}", lambda y=y, width=width: nn.Linear(y.shape[-1], width))(torch.tanh(y))
            outs.append(y)
        first, rest = outs[0], outs[1:]
        return (
            (first, *rest),
            {"logits": first, "rest": rest},
            Pair(first, {"more": tuple(rest)}),
            [{"a": first}, Pair(None, Pair(3, rest))],
        )[self.nest % 4]


Operation = Callable[[Network, str, "list[Tensor]", Tensor, int, int], "Tensor | None"]
OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


def _factors(n: int) -> list[tuple[int, int]]:
    return [(k, n // k) for k in range(2, n) if n % k == 0]


@operation
def linear(net, key, have, x, b, c):
    if x.dim():
        return net.layer(key, lambda: nn.Linear(x.shape[-1], (6, 8, 12, 4, 3, 5)[b % 6]))(x)


@operation
def shared(net, key, have, x, b, c):
    """A layer that was used before, where one fits."""
    fits = [m for m in net.used if isinstance(m, nn.Linear) and x.dim() and m.in_features == x.shape[-1]]
    return fits[b % len(fits)](x) if fits else None


@operation
def square(net, key, have, x, b, c):
    if x.dim():
        return net.layer(key, lambda: nn.Linear(x.shape[-1], x.shape[-1], bias=bool(b % 2)))(x).tanh()


@operation
def convolution(net, key, have, x, b, c):
    if x.dim() < 3 or x.shape[-1] < 2:
        return None
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    groups = [g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0]
    g = groups[b % len(groups)]
    out = g * (1 + c % 3)
    return net.layer(key, lambda: nn.Conv1d(x.shape[1], out, 2, groups=g))(x)


@operation
def activation(net, key, have, x, b, c):
    return (torch.tanh, F.silu, lambda y: y.clone().relu_())[b % 3](x)


@operation
def parts(net, key, have, x, b, c):
    """Split the last dimension and treat its parts as neurons of their own."""
    pairs = _factors(x.shape[-1]) if x.dim() else []
    if not pairs:
        return None
    outer, inner = pairs[b % len(pairs)]
    y = x.reshape(*x.shape[:-1], outer, inner)
    if c % 4 == 0:
        return (y * net.vector(key, (outer, 1))).flatten(-2)
    if c % 4 == 1:
        return (y * net.vector(key, (inner,)) - y.mean(-1, keepdim=True)).flatten(-2)
    if c % 4 == 2:
        return net.layer(key, lambda: nn.Linear(inner, inner))(y).mT.flatten(-2)
    return (y * y.mean(-2, keepdim=True).tanh()).flatten(-2)


@operation
def split_dim(net, key, have, x, b, c):
    if x.dim():
        d = x.dim() - 1 - b % x.dim()
        pairs = _factors(x.shape[d])
        return x.reshape(*x.shape[:d], *pairs[c % len(pairs)], *x.shape[d + 1 :]) if pairs else None


@operation
def merge_dims(net, key, have, x, b, c):
    if x.dim() > 1:
        d = b % (x.dim() - 1)
        return x.flatten(d, d + 1)


@operation
def reshape(net, key, have, x, b, c):
    """Any two numbers with the right product: cuts through the dimensions that there are."""
    pairs = _factors(x.numel())
    return x.reshape(pairs[b % len(pairs)]) if pairs else None


@operation
def permute(net, key, have, x, b, c):
    if x.dim() > 1:
        return x.transpose(b % x.dim(), c % x.dim())


@operation
def cat(net, key, have, x, b, c):
    y = have[-1 - c % len(have)]
    if x.dim() and x.dim() == y.dim():
        d = b % x.dim()
        if all(n == m for e, (n, m) in enumerate(zip(x.shape, y.shape, strict=True)) if e != d):
            return torch.cat([x, y], d)


@operation
def stack(net, key, have, x, b, c):
    if x.dim() < 5:
        return torch.stack([x, x.exp() if c % 2 else x.flip(-1) if x.dim() else x], b % (x.dim() + 1)).tanh()


@operation
def chunk(net, key, have, x, b, c):
    if x.dim():
        d = b % x.dim()
        if x.shape[d] % 2 == 0 and x.shape[d]:
            u, v = x.chunk(2, d)
            return (u, v, u * v.sigmoid(), u + v)[c % 4] if c % 4 < 2 else (u * v.sigmoid() if c % 4 == 2 else u + v)


@operation
def cut(net, key, have, x, b, c):
    if x.dim():
        d = b % x.dim()
        n = x.shape[d]
        return x[(slice(None),) * d + ((slice(1, None), slice(None, None, 2), slice(0, 1), slice(n // 2))[c % 4],)]


@operation
def pick(net, key, have, x, b, c):
    """Fixed places, in any order, some of them twice."""
    if x.dim():
        d = b % x.dim()
        n = x.shape[d]
        rng = np.random.default_rng(c)
        index = torch.from_numpy(rng.permutation(n) if c % 2 else rng.integers(0, n, 1 + c % 6))
        return x.index_select(d, index) if b % 2 else x[(slice(None),) * d + (index,)]


@operation
def turn(net, key, have, x, b, c):
    if x.dim():
        d = b % x.dim()
        return x.flip(d) if c % 2 else x.roll(1 + c % 3, d)


@operation
def scale(net, key, have, x, b, c):
    """A parameter over some of the last dimensions."""
    k = 1 + b % 2
    if x.dim() >= k:
        shape = [n if c >> j & 1 or j == 0 else 1 for j, n in enumerate(x.shape[-k:])]
        return x * net.vector(key, shape)


@operation
def add(net, key, have, x, b, c):
    y = have[-1 - b % len(have)]
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return None
    return (x + y, x * y.tanh(), torch.where(y > 0, x, y))[c % 3]


@operation
def outer(net, key, have, x, b, c):
    y = have[-1 - b % len(have)]
    if x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0]:
        return x[:, :, None] * y[:, None, :].tanh()


@operation
def reduce(net, key, have, x, b, c):
    if x.dim() > 1:
        d = b % x.dim()
        return (x.mean(d), x.amax(d, keepdim=True), x - x.mean(d, keepdim=True), x.std(d, correction=0), x.sum(d))[
            c % 5
        ]


@operation
def softmax(net, key, have, x, b, c):
    if x.dim():
        return x.softmax(b % x.dim())


@operation
def ordered(net, key, have, x, b, c):
    if x.dim():
        d = b % x.dim()
        return (x.cumsum(d), x.sort(d).values, x.cummax(d).values, x.tanh() * torch.arange(x.shape[-1]))[c % 4]


@operation
def product(net, key, have, x, b, c):
    y = have[-1 - b % len(have)]
    if x.dim() == y.dim() == 2:
        return next((x @ z for z in (y, y.t()) if z.shape[0] == x.shape[1]), None)
    if x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0]:
        return next((x @ z for z in (y, y.mT) if z.shape[1] == x.shape[2]), None)


@operation
def norm(net, key, have, x, b, c):
    if x.dim() < 2 or x.shape[-1] < 2:
        return None
    if c % 3 == 0:
        return net.layer(key, lambda: nn.LayerNorm(x.shape[-1]))(x)
    if c % 3 == 1:
        return net.layer(key, lambda: nn.RMSNorm(x.shape[-1], eps=1e-3))(x)
    n = x.shape[1]
    groups = [g for g in range(1, n + 1) if n % g == 0 and g < n * prod(x.shape[2:])]
    g = groups[b % len(groups)] if groups else 1
    return net.layer(key, lambda: nn.GroupNorm(g, n, eps=1e-3))(x) if n % g == 0 else None


@operation
def write(net, key, have, x, b, c):
    """In place, into a part of a copy."""
    if not x.dim():
        return None
    d = b % x.dim()
    y = x.clone()
    part = y.narrow(d, c % y.shape[d], 1 + (c // 7) % (y.shape[d] - c % y.shape[d]))
    kind = c % 5
    if kind == 0:
        part.mul_(2)
    elif kind == 1:
        part.copy_(have[0].mean().expand_as(part))
    elif kind == 2:
        part.add_(net.vector(key, part.shape[-1:]))
    elif kind == 3:
        part.copy_(part.flip(d).tanh())
    else:
        part.zero_()
    return y * y.flatten()[0].sigmoid() if b % 3 == 0 else y


@operation
def fill(net, key, have, x, b, c):
    """Into zeros, or into rows that were alike."""
    if not x.dim():
        return None
    d = b % x.dim()
    y = torch.zeros_like(x) if c % 2 else net.vector(key, x.shape[-1:]).expand(x.shape).clone()
    k = c // 2 % x.shape[d]
    y.narrow(d, k, x.shape[d] - k).copy_(x.narrow(d, 0, x.shape[d] - k))
    return y


@operation
def attention(net, key, have, x, b, c):
    if x.dim() != 3 or x.shape[1] > 8:
        return None
    n = x.shape[-1]
    heads = [h for h in range(1, n + 1) if n % h == 0]
    h = heads[b % len(heads)]
    qkv = net.layer(key, lambda: nn.Linear(n, 3 * n))(x).reshape(*x.shape[:2], 3, h, n // h).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv)
    return y.transpose(1, 2).reshape(x.shape) + (x if c % 2 else 0)


@operation
def pool(net, key, have, x, b, c):
    if x.dim() == 3 and x.shape[-1] >= 2:
        return (F.avg_pool1d(x, 2), F.max_pool1d(x, 2), F.pad(x, (1, 0)), F.interpolate(x, size=3))[b % 4]


@operation
def pad(net, key, have, x, b, c):
    if x.dim() > 1:
        before = [0] * (2 * (b % x.dim()))
        return F.pad(x, (*before, c % 2, 1 + c % 3))


@operation
def scatter(net, key, have, x, b, c):
    """Values written to places that data choose."""
    if x.dim() < 2:
        return None
    d = b % x.dim()
    with torch.no_grad():
        order = have[0].flatten()[:3].argsort() % x.shape[d]
        rows = have[0].flatten()[: x.shape[0]] > 0
    kind = c % 6
    y = x.clone() if c < 6 else x.exp().tanh()
    if kind == 0:
        return y.index_add(d, order, x.index_select(d, order).tanh())
    if kind == 1:
        return y.index_copy(d, order[:1], x.narrow(d, 0, 1).tanh())
    if kind == 2:
        y[(slice(None),) * d + (order[:1],)] = x.narrow(d, 0, 1).tanh()
    if kind == 3 and len(rows) == len(x):
        y[rows] += x[rows].tanh()
    if kind == 4 and len(rows) == len(x):
        y = y.masked_scatter(rows.view(-1, *[1] * (x.dim() - 1)).expand_as(y), x.tanh())
    if kind == 5:
        index = order.view([-1 if e == d else 1 for e in range(x.dim())])
        shape = [len(order) if e == d else n for e, n in enumerate(x.shape)]
        y = y.scatter_add(d, index.expand(shape), x.tanh().repeat_interleave(3, d).narrow(d, 0, 3))
    return y
