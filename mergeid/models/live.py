"""Live modules that meet: equal tensors in layers of other kinds or settings are another function."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from mergeid.plugins import ConfigDifference

HARMLESS = frozenset({"training", "inplace", "momentum", "dropout", "p", "track_running_stats", "padding_idx"})
"""Attributes of torch's own layers that do not count where a trained network is run."""
SHAPES = frozenset({
    "in_features", "out_features", "in1_features", "in2_features", "num_features", "in_channels", "out_channels",
    "num_embeddings", "embedding_dim", "normalized_shape", "num_channels", "num_parameters", "input_size",
    "hidden_size", "embed_dim", "kdim", "vdim", "head_dim",
})  # fmt: skip
"""What the shapes of the tensors say too."""


def module_differences(a: nn.Module, b: nn.Module) -> list[ConfigDifference]:
    """Layers of torch itself that lie in one place of both modules and compute different things: other kinds
    (``act: ReLU and GELU``), or other settings (``norm.eps``). What foreign code does besides is not seen."""
    found: list[ConfigDifference] = []
    theirs = dict(b.named_modules())
    for name, one in a.named_modules():
        two = theirs.get(name)
        if two is None or not (_known(one) and _known(two)):
            continue
        if type(one) is not type(two):
            found.append(ConfigDifference(name or "kind", type(one).__name__, type(two).__name__))
            continue
        mine, its = _settings(one), _settings(two)
        found += [
            ConfigDifference(f"{name}.{key}".removeprefix("."), mine.get(key), its.get(key))
            for key in mine.keys() | its.keys()
            if mine.get(key) != its.get(key)
        ]
    return sorted(found)


def _known(module: nn.Module) -> bool:
    """A layer of torch's own that does something when a trained network is run."""
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not isinstance(module, (_DropoutNd, nn.Identity))


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, switches and words (and tuples of such) that a layer holds."""
    plain, known = (bool, int, float, str, tuple), HARMLESS | SHAPES
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in known and isinstance(v, plain)}
