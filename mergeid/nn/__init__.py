"""Asymmetric layers: networks that merge as they are, because training could not put their neurons in another order.

    from mergeid import nn as mnn

    model = timm.create_model("resnet18")
    mnn.asymmetrise(model, "w", sigma=2.0, generator=torch.Generator().manual_seed(0))
    ...                                # train; save_file(model.state_dict(), "a.safetensors")
    plain = mnn.fold(model)            # the same function as a plain state dict of resnet18

An asymmetric layer computes with W_eff = F + D ⊙ W, F and D frozen, W trained. Nothing heavy is imported until a name
is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeid.nn.convert import Conversion as Conversion
    from mergeid.nn.convert import asymmetric_layer as asymmetric_layer
    from mergeid.nn.convert import asymmetrise as asymmetrise
    from mergeid.nn.effective import Asymmetric as Asymmetric
    from mergeid.nn.effective import Parts as Parts
    from mergeid.nn.effective import attach as attach
    from mergeid.nn.effective import effective_weight as effective_weight
    from mergeid.nn.folding import fold as fold
    from mergeid.nn.folding import fold_module as fold_module
    from mergeid.nn.folding import fold_state as fold_state
    from mergeid.nn.kinds import kind as kind
    from mergeid.nn.layers import register_layer as register_layer
    from mergeid.nn.names import is_asymmetric as is_asymmetric
    from mergeid.nn.sigma_asymmetric import SigmaAsymmetric as SigmaAsymmetric
    from mergeid.nn.sigma_asymmetric import fixed_gate as fixed_gate
    from mergeid.nn.sigma_asymmetric import give_gate as give_gate
    from mergeid.nn.stored import fold_file as fold_file
    from mergeid.nn.stored import restore as restore
    from mergeid.nn.syre import decay_groups as decay_groups

_HOME = {
    "Asymmetric": "effective",
    "Conversion": "convert",
    "Parts": "effective",
    "SigmaAsymmetric": "sigma_asymmetric",
    "asymmetric_layer": "convert",
    "asymmetrise": "convert",
    "attach": "effective",
    "decay_groups": "syre",
    "effective_weight": "effective",
    "fixed_gate": "sigma_asymmetric",
    "fold": "folding",
    "fold_file": "stored",
    "fold_module": "folding",
    "fold_state": "folding",
    "give_gate": "sigma_asymmetric",
    "is_asymmetric": "names",
    "kind": "kinds",
    "register_layer": "layers",
    "restore": "stored",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
