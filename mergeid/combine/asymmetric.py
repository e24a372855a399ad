"""Averaging asymmetric layers (`mergeid.nn`): F + D ⊙ W is linear in W only where both models have the same D.

Two networks that share F and D keep both: equal tensors stay equal in every average. Where B was permuted, its mask is
no longer A's, and averages of D and W would not give the average of the effective weights. Such a layer is averaged in
its effective weights and written as an ordinary one in the same tensors: W effective, F = 0, D = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mergeid.nn.names import FIXED, MASK, asymmetric_parameters

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[str], "Tensor"]


def effective_averages(
    names: Iterable[str],
    reads: Sequence[Read],
    merged: Callable[[str, list[Tensor], Tensor | None], Tensor],
    base: Read | None = None,
) -> dict[str, Tensor]:
    """Tensors to write instead of the tensor-wise averages: those of the layers whose masks differ.

    Args:
        names: the tensors to be merged.
        reads: read a tensor of each model, in the first one's order.
        merged: the merge of a named tensor, from those of the models and of the base.
        base: reads the base model, where the method needs one.
    """
    import torch

    from mergeid.nn.effective import effective_weight

    known = list(names)
    present = set(known)
    out: dict[str, Tensor] = {}
    for parameter in asymmetric_parameters(known):
        fixed, mask = parameter + FIXED, parameter + MASK
        if mask not in present or all(torch.equal(reads[0](mask), read(mask)) for read in reads[1:]):
            continue
        every = [effective_weight(read(parameter), read(fixed), read(mask)) for read in reads]
        origin = None if base is None else effective_weight(base(parameter), base(fixed), base(mask))
        value = merged(parameter, every, origin).to(every[0].dtype)
        out |= {parameter: value, fixed: torch.zeros_like(value), mask: torch.ones_like(value)}
    return out


def compared(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """What a plan should say of the fixed parts of two state dicts; nothing for ordinary networks."""
    import torch

    layers = asymmetric_parameters(a)
    if not layers:
        return []
    names = {p: [n for n in (p + FIXED, p + MASK) if n in a] for p in layers}
    other = [p for p in layers if not all(n in b and torch.equal(a[n], b[n]) for n in names[p])]
    if not other:
        return [f"both networks have the same fixed parts (F, D) in all {len(layers)} asymmetric weights"]
    return [
        f"the fixed parts of {len(other)} of {len(layers)} asymmetric weights differ (first: {other[0]!r}): nothing "
        f"keeps their neurons in one order"
    ]


def note(overrides: Iterable[str]) -> list[str]:
    """What the user should know about `effective_averages`."""
    count = sum(1 for n in overrides if n.endswith(MASK))
    if not count:
        return []
    return [
        f"{count} asymmetric layers of B do not have A's masks (other masks, or its neurons were permuted): their "
        f"effective weights were averaged, and they are ordinary layers in the result (fixed part 0, mask 1)"
    ]
