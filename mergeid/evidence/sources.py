"""Where a layer's fixed part F and its scaling D come from: W_eff = F + D ⊙ W.

| what is known | F | D |
|---|---|---|
| an asymmetric layer's own tensors | ``X_fixed`` | ``X_mask``, 1 where there is none |
| LoRA adapters on a base checkpoint | base weights | low-rank: the row space of all A |
| a base checkpoint | base weights | 1, or 0 for a tensor that training left alone |
| given arrays | as given | as given |
| nothing | 0 | 1: every assignment costs the same, so structure identifies nothing |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.inputs import weight_rows
from mergeid.evidence.support import Support

FIXED, MASK = "_fixed", "_mask"
"""What an asymmetric layer stores beside its trainable tensor ``X``: F as ``X_fixed``, D as ``X_mask``."""
PEFT_PREFIX = "base_model.model."

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class FixedPart:
    """F and D of one weight, in the weight's own shape.

    Attributes:
        source: "stored", "lora", "base", "given" or "nothing".
        scaling: D; None: all ones. row_space: orthonormal [inputs, rank] of a low-rank trainable part, instead of D.
    """

    source: str
    fixed: Tensor
    scaling: Tensor | None = None
    row_space: Tensor | None = None

    def classes(self, module: nn.Module, supports: Sequence[Support]) -> FunctionClasses:
        """The function classes of the layer's neurons."""
        scaling = None if self.scaling is None else weight_rows(module, self.scaling)
        return FunctionClasses(weight_rows(module, self.fixed), tuple(supports), scaling, row_space=self.row_space)


def effective_weight(state: State, name: str) -> Tensor:
    """F + D ⊙ W of an asymmetric layer's tensor, else the tensor itself."""
    weight = state[name]
    if name + FIXED not in state:
        return weight
    mask = state.get(name + MASK)
    return state[name + FIXED] + (weight if mask is None else mask * weight)


def given(fixed: Tensor, scaling: Tensor | None = None, row_space: Tensor | None = None) -> FixedPart:
    """F and D as the caller says. Raises `MergeidError` where D has another shape than F, or both D and a row space
    are given."""
    if scaling is not None and (row_space is not None or scaling.shape != fixed.shape):
        raise MergeidError("give a scaling D of the shape of F, or a row space, or neither")
    return FixedPart("given", fixed, scaling, None if row_space is None else _orthonormal(row_space))


def nothing(weight: Tensor) -> FixedPart:
    """F = 0 and D = 1."""
    return FixedPart("nothing", torch.zeros_like(weight))


def stored(name: str, *states: State) -> FixedPart | None:
    """An asymmetric layer's own F and D, None where the first state stores none.

    Raises `MergeidError` where the states do not store the same: such networks were not made to be merged."""
    first = states[0]
    if all(name + FIXED not in s for s in states):
        return None
    for other in states:
        for suffix in (FIXED, MASK):
            one, two = first.get(name + suffix), other.get(name + suffix)
            if (one is None) != (two is None) or (
                one is not None and two is not None and not (one.shape == two.shape and torch.equal(one, two))
            ):
                raise MergeidError(
                    f"the two models do not store the same {name + suffix!r}, so that their neurons have no fixed part "
                    "in common; make both asymmetric with one seed"
                )
    return FixedPart("stored", first[name + FIXED], first.get(name + MASK))


def from_base(name: str, base: State, *, frozen: bool = False) -> FixedPart:
    """F = the base checkpoint's weight (its effective one where it is asymmetric), the part that both runs share.

    Raises `MergeidError` where the base has no such tensor."""
    if name not in base:
        raise MergeidError(f"the base checkpoint has no tensor {name!r}; give the base that both models started from")
    fixed = effective_weight(base, name)
    return FixedPart("base", fixed, torch.zeros_like(fixed) if frozen else None)


def lora_rows(name: str, adapters: Sequence[State]) -> Tensor | None:
    """Basis [inputs, rank] of the rows of the lora_A matrices on tensor `name` in PEFT files; None where there are
    none.

    ``base_model.model.X.lora_A.weight`` (or ``X.lora_A.default.weight``) acts on ``X.weight``."""
    module = name.removesuffix(".weight")
    found = []
    for adapter in adapters:
        for key, value in adapter.items():
            layer, hit, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_A.")
            if hit and layer == module:
                found.append(value)
    return _orthonormal(torch.cat(found).T) if found else None


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of columns [d, r]."""
    left, singular, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    rank = int((singular > max(columns.shape) * torch.finfo(columns.dtype).eps * singular.max()).sum())
    answer: Tensor = left[:, :rank]
    return answer


def fixed_part(
    name: str,
    a: State,
    b: State,
    *,
    base: State | None = None,
    adapters: Sequence[State] = (),
    frozen: Sequence[str] = (),
) -> FixedPart:
    """The fixed part that two models share in tensor `name`: stored, else from the base, else nothing.

    Args:
        base: the checkpoint that both started from; adapters: both runs' PEFT tensors on that base.
        frozen: patterns of tensors that training left alone (D = 0). With adapters, a tensor without one is frozen.

    Raises `MergeidError` where the models disagree about F or D, where the base lacks the tensor or has another shape.
    """
    found = stored(name, a, b)
    if found is not None:
        return found
    if base is None:
        if adapters:
            raise MergeidError("LoRA adapters need the base checkpoint that they were trained on; give --base")
        return nothing(effective_weight(a, name))
    rows = lora_rows(name, adapters)
    alone = any(fnmatchcase(name, pattern) for pattern in frozen) or (bool(adapters) and rows is None)
    part = from_base(name, base, frozen=alone)
    if part.fixed.shape != a[name].shape:
        raise MergeidError(
            f"tensor {name!r} has shape {tuple(part.fixed.shape)} in the base and {tuple(a[name].shape)} in the model; "
            "give the base that both models started from"
        )
    if rows is None:
        return part
    if part.fixed.dim() != 2:
        raise MergeidError(f"a LoRA adapter on {name!r} cannot be read: only matrices have a row space")
    return FixedPart("lora", part.fixed, row_space=rows)
