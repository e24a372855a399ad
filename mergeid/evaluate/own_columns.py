"""Outputs of networks with the classes of several models: each model speaks about its own columns alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class OwnColumns:
    """Attributes:
    names: of the outputs that hold class logits, one model's columns after the other's.
    classes: how many columns each model has.
    """

    names: frozenset[str]
    classes: tuple[int, ...]

    def of(self, said: Sequence[Mapping[str, Tensor]], owners: Tensor | None) -> dict[str, Tensor]:
        """What is compared, by name: logits over the classes of one model.

        Args:
            said: outputs of every model by name; or of the one network that is compared with them.
            owners: number of the model that each example belongs to: then its columns (-inf where another model has
                more). None: every model's columns are an output of their own.
        """
        found: dict[str, Tensor] = {}
        for name in said[0]:
            outs = [s[name] for s in said] * (len(self.classes) // len(said))
            if name not in self.names:
                found[name] = outs[0] if len(said) == 1 else together(outs, owners)
                continue
            parts = [out.split(self.classes, -1)[k] for k, out in enumerate(outs)]
            if owners is None:
                found |= {self.called(name, k): part for k, part in enumerate(parts)}
                continue
            wide = [F.pad(part, (0, max(self.classes) - part.shape[-1]), value=-inf) for part in parts]
            found[name] = together(wide, owners)
        return found

    def called(self, name: str, model: int) -> str:
        """A model's columns of an output."""
        return f"{name} (classes of {chr(ord('a') + model)})".strip()


def together(outs: Sequence[Tensor], owners: Tensor | None) -> Tensor:
    """Of every example what its own model says; the models' mean where there are no owners, or where the output is not
    one of single examples (a penalty, say)."""
    if owners is None or outs[0].shape[:1] != owners.shape:
        return torch.stack(list(outs)).mean(0)
    return torch.stack(list(outs))[owners, torch.arange(len(owners))]
