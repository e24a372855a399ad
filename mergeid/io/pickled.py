"""Pickled checkpoints, read only when the user allows it and only through torch's restricted unpickler."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.basics.reading import check_regular
from mergeid.errors import MergeidError, MergeidWarning, is_text, reason, shown
from mergeid.io.header import MOST_DIMENSIONS

if TYPE_CHECKING:
    from torch import Tensor

MOST_EXPANDED = 1 << 20
"""Bytes up to which a tensor may be larger than what is stored of it."""
_AVERAGED = ("state_dict_ema", "model_ema")
"""Keys of weights that were averaged over the training: those that timm's scripts report on, and its loader takes."""
_AVERAGE = re.compile(r"(^|_)(ema|swa|average|averaged|polyak)(_|$)", re.IGNORECASE)
_UPDATES = "n_averaged"
"""What torch's AveragedModel keeps beside the weights under ``module.``: how often they were averaged."""
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "module")
"""Keys under which training scripts put the state dict."""


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.bin``/``.pt``/``.pth``/``.ckpt`` file, entries that are no tensors left out.

    Raises:
        MergeidError: damaged, needs code to load (refused even when pickles are allowed), or holds no tensors.
    """
    import warnings

    import torch

    check_regular(path, "a pickled state dict")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about formats that are refused below
            with torch.serialization.safe_globals([Namespace]):  # the options of a training script, plain values
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, from UnpicklingError to RuntimeError
        # torch recommends to load it without protection where it holds code
        why = "it holds more than tensors" if "Weights only load failed" in str(error) else reason(error)
        raise MergeidError(
            f"{path} cannot be read as a pickled state dict ({why}); expected plain tensors: "
            "save model.state_dict() as safetensors"
        ) from None
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            if key in _AVERAGED:
                warnings.warn(
                    f"{path} also holds weights averaged over training ({key}); those are used",
                    MergeidWarning,
                    stacklevel=2,
                )
            else:
                _tell_of_averages(path, found, key)
            found = found[key]
            break
    if isinstance(found, Mapping) and all(str(k) == _UPDATES or str(k).startswith("module.") for k in found):
        found = {k: v for k, v in found.items() if k != _UPDATES}
    if not isinstance(found, Mapping):
        raise MergeidError(f"{path} holds a {type(found).__name__}; expected a state dict (names and tensors)")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise MergeidError(f"{path} contains no tensors; expected a state dict (names and tensors)")
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return {name: tensor.resolve_conj().resolve_neg() for name, tensor in tensors.items()}


def _tell_of_averages(path: Path, found: Mapping[str, object], taken: str) -> None:
    """Warns where averaged weights lie beside the ones that are read, under a key that not every script uses so."""
    import warnings

    other = next((k for k, v in found.items() if _AVERAGE.search(str(k)) and isinstance(v, Mapping) and v), None)
    if other is not None:
        warnings.warn(
            f"{path} also holds {shown(other)}, which may be averaged weights; those under {taken!r} are used",
            MergeidWarning,
            stacklevel=3,
        )


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    """Raises `MergeidError` for a tensor that safetensors cannot hold."""
    import torch

    kind = next(
        (
            kind
            for kind, found in (
                ("no values (meta device)", tensor.is_meta),
                ("quantised values", tensor.is_quantized),
                ("sparse values", tensor.layout is not torch.strided or tensor.is_nested),
                ("a class of its own", type(tensor) not in (torch.Tensor, torch.nn.Parameter)),
                (f"{tensor.dim()} dimensions", tensor.dim() > MOST_DIMENSIONS),
                ("more elements than are stored (expanded)", _expanded(tensor)),
            )
            if found
        ),
        None,
    )
    if kind is not None:
        raise MergeidError(f"tensor {shown(name)} of {path} has {kind}; expected a plain, dense tensor")
    if not is_text(name):
        raise MergeidError(f"{path} has the tensor {shown(name)}, whose name cannot be stored in a file; rename it")


def _expanded(tensor: Tensor) -> bool:
    """Whether writing it out would take far more room than the file that it came from."""
    if tensor.is_meta or tensor.is_nested or str(tensor.layout) != "torch.strided":
        return False
    return tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), MOST_EXPANDED)
