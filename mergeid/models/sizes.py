"""Models that were made for images of different sizes.

What follows the size of the images, such as learned positions, is resampled as the library itself does when it loads
weights at another size: the adapter knows the tables. All models get the first one's size, unless ``--config`` or
``--image-size`` names another model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Formed, derived, read_from
from mergeid.models.architecture import find_architecture, stated_config
from mergeid.models.configs import index_of
from mergeid.plugins import Architecture, Resized, ResizesTables, Size, TensorInfo
from mergeid.request.request import Reading

if TYPE_CHECKING:
    from torch import Tensor

_SEEING = ("vision", "visual", "visn", "image", "pixel", "patch")
"""In the names of layers and models that take images; most of them have kernels besides."""


@dataclass
class SameSizes:
    """Models with tables of one size.

    Attributes:
        models: in the order given.
        resized: what was resampled, for the record: source, sizes before and after, tensors.
        notes: the same in words.
    """

    models: list[Checkpoint]
    resized: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def same_sizes(models: Sequence[Checkpoint], reading: Reading, letters: int) -> SameSizes:
    """Bring all models to one image size. Nothing is built where tensors of equal names have equal shapes.

    Args:
        models: all that meet, the base too, under the same names.
        letters: how many of them ``--config`` can name.

    Raises `MergeidError` for a tensor that depends on the size and that the library does not resample."""
    found = SameSizes(list(models))
    first = models[0]
    if reading.image_size is not None and first.files:
        _check_takes_images(first, reading)
    if not any(_differing(c, first, reading.skip) for c in models[1:]) or not all(c.files for c in models):
        return found
    try:
        known = [find_architecture(c, reading.arch) for c in models]
    except MergeidError:  # nothing is known of these networks, and the shapes are compared later
        return found
    adapter: Any = known[0][0]
    if not isinstance(adapter, ResizesTables) or any(a is not adapter for a, _ in known):
        return found
    archs = [arch for _, arch in known]
    at = _chosen(adapter, archs, reading, letters)
    for i, other in enumerate(models):
        if not _differing(other, models[at], reading.skip):
            continue
        made = adapter.resized(archs[i], other.table, archs[at], models[at].table)
        if made is not None:
            _resize(found, i, at, made, adapter, archs[at])
    return found


def _check_takes_images(first: Checkpoint, reading: Reading) -> None:
    """Raises `MergeidError` for a size of images that no image has, also where no data is given. Models of texts and
    images are known by their tensors and classes: configs of texts speak of images too."""
    from mergeid.data.conform import facts

    try:
        adapter, arch = find_architecture(first, reading.arch)
    except MergeidError:  # nothing is known of this network
        return
    folder = first.path if first.is_folder else first.path.parent
    told = (stated_config(first, reading.arch) or {}).get("architectures")
    names = [*first.table, arch.id.lower(), str(told).lower()]
    sees = any(len(t.shape) > 3 for t in first.table.values()) or any(word in n for n in names for word in _SEEING)
    if not sees and facts(adapter, arch, folder).get("kind") not in (None, "image"):
        raise MergeidError(f"{arch.id} takes no images; leave out --image-size")


def _differing(one: Checkpoint, other: Checkpoint, skip: Sequence[str]) -> bool:
    return any(
        name in other.table and info.shape != other.table[name].shape and not any(fnmatchcase(name, p) for p in skip)
        for name, info in one.table.items()
    )


def _chosen(adapter: ResizesTables, archs: Sequence[Architecture], reading: Reading, letters: int) -> int:
    """Whose size counts."""
    if reading.config is not None:
        return index_of(reading.config, letters) or 0
    asked = reading.image_size
    if asked is None:
        return 0
    return next((i for i, arch in enumerate(archs) if adapter.input_size(arch) == (asked, asked)), 0)


def _resize(found: SameSizes, i: int, at: int, made: Resized, adapter: ResizesTables, arch: Architecture) -> None:
    other, target = found.models[i], found.models[at]
    size, to = _words(made.size), _words(made.to)
    if made.fixed:
        raise MergeidError(
            f"{other.source} was made for images of {size} and {target.source} for {to}; {made.fixed[0]!r} depends on "
            f"that, and {adapter.name} resamples no such tensor: expected models of one image size"
        )
    formed = {name: read_from(other, name) for name in other.table}
    for name, resample in made.tensors.items():
        if resample is None:
            formed[name] = read_from(target, name)
        else:
            info = TensorInfo(other.table[name].dtype, target.table[name].shape)
            formed[name] = Formed(info, _form(other, name, resample), ((other, name),), f"resampled {size}")
    config = None if other.config is None else adapter.config_at(other.config, arch, made.to, target.config)
    parents = [other, target] if None in made.tensors.values() else [other]
    found.models[i] = derived(other.source, other, formed, parents=parents, config=config)
    names = [n for n, resample in made.tensors.items() if resample is not None]
    found.resized.append({"source": other.source, "size": [*made.size], "to": [*made.to], "tensors": names})
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    found.notes.append(
        f"{other.source} was made for images of {size}: its {names[0]}{more} resampled to the {to} of {target.source}, "
        f"as {adapter.name} does"
    )


def _form(model: Checkpoint, name: str, resample: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: resample(model.tensor(name))


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]} pixels"
