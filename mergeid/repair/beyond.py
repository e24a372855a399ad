"""What becomes of an operation's answer before anything mixes its entries: the norm or scale behind it, and the sum
with what a residual stream already holds.

A layer that is fitted to its own answer alone leaves two errors to those behind it: a norm weighs the models' answers
by statistics of each model, and a residual stream carries the merged network's earlier errors past every block. So
where the answer goes through an elementwise affine map first (statistics and scales that are known, tensors that the
network has already computed), it is compared with the models' behind that map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergeid.repair.made import Place
from mergeid.repair.paced import Node, Value

VIEWS = frozenset({"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"})
SAME = frozenset({"clone", "contiguous", "alias", "detach"})
TURNED = frozenset({"transpose", "t", "permute"})
NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"})


@dataclass(frozen=True)
class Step:
    """One operation behind a layer, with the shape that it takes."""

    node: Node
    takes: Value
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Beyond:
    """The elementwise affine map behind one operation.

    Attributes:
        steps: its operations, in order.
        needs: tensors of the network that take part in it, computed before the layer.
        shifts: the first of them adds a bias of its own, so that the layer needs none.
    """

    steps: tuple[Step, ...]
    needs: frozenset[Value]
    shifts: bool

    def __call__(self, state: Mapping[str, Tensor], kept: Mapping[Value, Tensor], answer: Tensor) -> Tensor:
        """What an answer has become at the end of the map, in the network of these weights."""
        value = answer.clone()
        for step in self.steps:
            given = [_given(x, state, kept, (step.takes, value)) for x in step.node.args]
            out = step.node.func(*given, **step.node.kwargs)
            value = out[0] if isinstance(out, (tuple, list)) else out
        return value

    def gain(self, state: Mapping[str, Tensor], kept: Mapping[Value, Tensor], answer: Tensor) -> Tensor:
        """What every entry of an answer is multiplied by on the way, float64."""
        wide = {x.name: state[x.name].double() for step in self.steps for x in step.node.args if isinstance(x, Place)}
        none = {v: torch.zeros_like(kept[v], dtype=torch.float64) for v in self.needs}
        zero = torch.zeros_like(answer, dtype=torch.float64)
        return self.back(self(wide, none, zero + 1) - self(wide, none, zero))

    def back(self, value: Tensor) -> Tensor:
        """The entries of the map's end where they lie in the layer's answer."""
        for step in reversed(self.steps):
            name, args = step.node.name, step.node.args
            if name == "transpose":
                value = value.transpose(args[1], args[2])
            elif name == "t":
                value = value.t()
            elif name == "permute":
                value = value.permute(*torch.argsort(torch.tensor([d % value.dim() for d in args[1]])).tolist())
            elif name in VIEWS:
                value = value.reshape(step.shape)
        return value


def _given(x: Any, state: Mapping[str, Tensor], kept: Mapping[Value, Tensor], now: tuple[Value, Tensor]) -> Any:
    """What an operation is given (no function within another that calls itself: a cycle would keep the tensors)."""
    if isinstance(x, Value):
        return now[1] if x == now[0] else kept[x].clone()
    if isinstance(x, Place):
        return state[x.name].as_strided(x.shape, x.stride, x.offset)
    return [_given(y, state, kept, now) for y in x] if isinstance(x, (list, tuple)) else x


def beyond(nodes: Sequence[Node]) -> dict[int, Beyond]:
    """The maps behind the operations on weights of one pass, by their numbers; only where there is more than views.

    Args:
        nodes: its operations on activations.
    """
    users: dict[Value, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(node.takes):
            users[value].append(node)
    found = {node.index: _followed(node, users) for node in nodes if node.index is not None}
    return {index: made for index, made in found.items() if made is not None}


def _followed(start: Node, users: Mapping[Value, Sequence[Node]]) -> Beyond | None:
    at, shape = Value(start.step, 0), start.shape
    steps: list[Step] = []
    length = 0
    needs: set[Value] = set()
    while len(users[at]) == 1:
        (node,) = users[at]
        kind = _kind(node, at, shape, start.step)
        if kind is None:
            break
        steps.append(Step(node, at, shape))
        if kind != "view":
            length = len(steps)
            needs |= {v for v in node.takes if v != at}
        at, shape = Value(node.step, 0), node.shape
    if not length:
        return None
    first = next(step.node for step in steps if step.node.name not in VIEWS | SAME | TURNED)
    shifts = first.name in NORMS and isinstance(first.args[2], Place)
    return Beyond(tuple(steps[:length]), frozenset(needs), shifts)


def _kind(node: Node, at: Value, shape: tuple[int, ...], before: int) -> str | None:
    """ "view" or "affine"; None for what ends the map."""
    name = node.name
    if name in VIEWS | SAME | TURNED:
        return "view" if node.args[0] == at and list(node.takes) == [at] else None
    if node.shape != shape or node.opaque:
        return None
    if name in NORMS:
        training = name != "_native_batch_norm_legit_no_training" and node.args[5] is True
        known = all(x is None or isinstance(x, Place) for x in node.args[1:5])
        return "affine" if node.args[0] == at and known and not training else None
    others = [v for v in node.takes if v != at]
    once = list(node.takes).count(at) == 1
    if name in ("add", "add_") and once and node.kwargs.get("alpha", 1) == 1:
        return "affine" if all(0 <= v.step < before for v in others) else None
    if name in ("mul", "mul_", "div", "div_") and once and not others:
        return "affine" if name.startswith("mul") or node.args[0] == at else None
    return None
