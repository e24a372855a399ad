"""One architecture at two image sizes: tables of positions, resampled as timm does when it loads weights.

timm's ``checkpoint_filter_fn`` of a model knows the tables of its class, absolute positions and relative position
biases. It takes tables for those of square images; others go through ``timm.layers.resample_abs_pos_embed``, as in
``set_input_size``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Architecture, MergeidError, Resized, Size, TensorTable
from mergeid_timm import compare, names
from mergeid_timm.index import COMPUTED

if TYPE_CHECKING:
    from torch import Tensor, nn

Build = Callable[[Architecture], "nn.Module"]
NOT_OF_SIZE = frozenset({"pretrained_cfg", "tag", "num_classes", "in_chans"})
"""Options of an architecture that do not go into ``model_args``."""


def input_size(arch: Architecture, model: Any) -> Size:
    """Height and width of the images that an architecture is built for."""
    size = arch.options.get("img_size")
    if size is None:
        size = tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def resized(
    arch: Architecture, table: TensorTable, to: Architecture, to_table: TensorTable, build: Build
) -> Resized | None:
    """A model's tables at the image size of `to`; None where the two are not one architecture at two sizes.

    Args:
        arch, table: the model and its tensors, under the names of `to_table`.
        build: gives the network of an architecture, on the meta device.
    """
    target = build(to)
    size = input_size(arch, build(arch))
    own = None if size == input_size(to, target) else _at_size_of(arch, to, target, build)
    if own is None:
        return None
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (own, target)]
    key_of = names.tensor_names(to.name, target, to_table)
    tensors: dict[str, Callable[[Tensor], Tensor] | None] = {}
    fixed = []
    for name in (n for n, info in table.items() if n in to_table and info.shape != to_table[n].shape):
        key = key_of.get(name, name)
        if name.endswith(COMPUTED):
            tensors[name] = None
        elif key in shapes[0] and shapes[0][key] != shapes[1][key]:
            resample = _Resample(key, own, target, square=size[0] == size[1])
            if resample.works:
                tensors[name] = resample
            else:
                fixed.append(name)
    return Resized(size, input_size(to, target), tensors, tuple(fixed)) if tensors or fixed else None


def config_at(
    config: Mapping[str, Any], to: Architecture, size: Size, like: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A config.json of the architecture `to` with `config`'s own classes and preprocessing.

    Args:
        like: config.json of `to`; None: it has none.
    """
    if like is None:
        options = {k: v for k, v in to.options.items() if k not in NOT_OF_SIZE}
        like = {"architecture": to.name, **({"model_args": options} if options else {})}
    found = compare.adopted(config, like)
    facts = found.get("pretrained_cfg")
    if isinstance(facts, Mapping) and "input_size" in facts:
        found["pretrained_cfg"] = {**facts, "input_size": [facts["input_size"][0], *size]}
    return found


def _at_size_of(arch: Architecture, to: Architecture, target: Any, build: Build) -> nn.Module | None:
    """The network of `to` at the size (and with the windows) of `arch`, where it is that of `arch`."""
    common = {k: getattr(target, k) for k in ("num_classes", "in_chans") if isinstance(getattr(target, k, None), int)}
    theirs = build(replace(arch, options={**arch.options, **common}))
    size = input_size(arch, theirs)
    windows = {w for m in theirs.modules() if (w := _window(m)) is not None}
    for more in ({}, *({"window_size": w} for w in sorted(windows))):
        options = {**to.options, **common, "img_size": size[0] if size[0] == size[1] else size, **more}
        try:
            own = build(replace(to, options=options))
        except MergeidError:  # its class has no such option
            continue
        if list(compare.traits(own)) == list(compare.traits(theirs)):
            return own
    return None


def _window(module: nn.Module) -> int | None:
    found = getattr(module, "window_size", None)
    return found[0] if isinstance(found, tuple) and len(set(found)) == 1 else None


@dataclass(frozen=True)
class _Resample:
    """One table at another size.

    Attributes:
        key: its name in the network.
        own, target: the network at both sizes, without memory.
        square: whether it was made for square images.
    """

    key: str
    own: Any
    target: Any
    square: bool

    def __call__(self, value: Tensor) -> Tensor:
        found = self._by_filter if self.square else self._by_grid
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the speed of what timm does
            return found(value.float()).to(value.dtype).contiguous()

    @property
    def works(self) -> bool:
        """Whether timm gives the table the shape that it needs."""
        import torch

        own, wanted = (m.state_dict()[self.key].shape for m in (self.own, self.target))
        try:
            return bool(self(torch.zeros(own)).shape == wanted)
        except Exception:  # filters are written for particular files and fail in their own ways on others
            return False

    def _by_filter(self, value: Tensor) -> Tensor:
        own, target = self.own.state_dict(), self.target.state_dict()
        rest = {k: v for k, v in target.items() if k in own and own[k].shape == v.shape}
        module: Any = sys.modules[type(self.target).__module__]
        found: Tensor = module.checkpoint_filter_fn({**rest, self.key: value}, self.target)[self.key]
        return found

    def _by_grid(self, value: Tensor) -> Tensor:
        from timm.layers.pos_embed import resample_abs_pos_embed

        if self.key != "pos_embed":
            raise NotImplementedError(self.key)
        before = 0 if self.own.no_embed_class else self.own.num_prefix_tokens
        grids = [list(m.patch_embed.grid_size) for m in (self.target, self.own)]
        found: Tensor = resample_abs_pos_embed(value, *grids, num_prefix_tokens=before)
        return found
