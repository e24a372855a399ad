"""Where a network reads its inputs as they come: layers whose inputs no parameter can change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mergeid.basics.hooks import heard

Forward = Callable[[nn.Module, Any], Any]


def entries(model: nn.Module, batch: Any, forward: Forward, *, seed: int = 0) -> set[str]:
    """Names of the modules with parameters of their own that are called with the same tensors whatever the network's
    parameters are: a patch embedding, a stem, a first linear layer. Empty where that cannot be tried out.

    The parameters are changed for one forward pass, and put back."""
    if any(p.is_meta for p in model.parameters()):
        return set()
    before = _inputs(model, batch, forward)
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for p, value in kept:
                if p.is_floating_point():
                    noise = torch.randn(p.shape, generator=generator).to(p)
                    p.add_(noise * (value.float().abs().mean().to(p) + 0.1))
        after = _inputs(model, batch, forward)
    except Exception:  # other parameters may lead a foreign forward astray
        return set()
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
    return {name for name, seen in before.items() if _same(seen, after.get(name))}


def _inputs(model: nn.Module, batch: Any, forward: Forward) -> dict[str, list[Tensor]]:
    """The tensors that every module with parameters is called with, all calls one after another."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, keywords: Any) -> None:
            leaves = [x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor)]
            found.setdefault(name, []).extend(x.detach().clone() for x in leaves)

        return read

    with ExitStack() as stack, torch.no_grad():
        for name, module in heard(model):
            if any(p is not None for p in module._parameters.values()):
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        forward(model, batch)
    return found


def _same(before: list[Tensor], after: list[Tensor] | None) -> bool:
    return (
        after is not None
        and len(before) == len(after)
        and all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    )
