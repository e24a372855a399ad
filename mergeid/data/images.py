"""Image folders, and images as arrays: resized, cropped and normalised as the model's own weights expect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mergeid.data.batching import Item, ItemDataset, told
from mergeid.errors import MergeidError, MergeidWarning

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 16
"""Images more elongated than this lose their ends before they are resized: only their centre is kept in any case."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def image_folder(folder: Path, about: Mapping[str, Any]) -> ItemDataset:
    """``folder/class/image.png`` with the class as label, or ``folder/image.png`` without labels.

    Classes are numbered in the order of their names (numbers by value), as timm does, but by the model's own label
    map where the sub-folders bear its names.

    Raises `MergeidError` where there are no images.
    """
    try:
        return _open_folder(folder, about)
    except OSError as error:
        raise MergeidError(
            f"the folder {folder} cannot be read ({error.filename}: {error.strerror}); check its permissions"
        ) from error


def _open_folder(folder: Path, about: Mapping[str, Any]) -> ItemDataset:
    classes = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural)
    flat = _images(folder)
    if flat:
        _warn_of_enlarging(flat[0], folder, about)
        return _files(flat, None, about, str(folder))
    classes = [c for c in classes if _images(c)]
    if not classes:
        kinds = ", ".join(sorted(SUFFIXES))
        raise MergeidError(
            f"the folder {folder} contains no images ({kinds}), neither in class sub-folders nor directly; give an "
            "image folder or another kind of data"
        )
    number = _class_numbers([c.name for c in classes], about, folder)
    paths = [p for c in classes for p in _images(c)]
    labels = [number[c.name] for c in classes for _ in _images(c)]
    _warn_of_enlarging(paths[0], folder, about)
    return _files(paths, torch.tensor(labels), about, str(folder))


def _warn_of_enlarging(first: Path, folder: Path, about: Mapping[str, Any]) -> None:
    """Small images mostly mean a model that was trained at another size than its architecture's default."""
    from PIL import Image

    try:
        with Image.open(first) as image:
            width, height = image.size
    except Exception:  # named when it is read
        return
    wanted = about["size"][1:]
    if 2 * min(width, height) <= min(wanted):
        warnings.warn(
            f"the images in {folder} ({width}x{height}) are enlarged to {wanted[1]}x{wanted[0]}, the model's default; "
            "if the models were trained at another size, give it with --image-size",
            MergeidWarning,
            stacklevel=2,
        )


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)


def _natural(path: Path) -> tuple[bool, int, str]:
    digits = path.name.isascii() and path.name.isdigit()
    return (not digits, int(path.name) if digits else 0, path.name)


def _class_numbers(names: Sequence[str], about: Mapping[str, Any], folder: Path) -> dict[str, int]:
    known: Mapping[str, int] = about.get("class_names") or {}
    if all(n in known for n in names):
        return {n: int(known[n]) for n in names}
    classes = about.get("classes")
    if classes and len(names) > classes:
        raise MergeidError(
            f"there are {len(names)} class sub-folders ({names[0]!r}, {names[1]!r}, …), but the model has {classes} "
            "classes; give data of the model's own classes"
        )
    if classes and (len(names) < classes or known):
        stranger = next((n for n in names if n not in known), names[0])
        why = f"has no class named {stranger!r}" if known else f"has {classes} classes without names"
        warnings.warn(
            f"the {len(names)} class sub-folders of {folder} are numbered in the order of their names ({names[0]!r} is "
            f"class 0, {names[-1]!r} is class {len(names) - 1}), because the model {why}; where labels count and their "
            "numbers are others, give inputs and labels as .npz",
            MergeidWarning,
            stacklevel=2,
        )
    return {n: i for i, n in enumerate(names)}


def _files(paths: list[Path], labels: Tensor | None, about: Mapping[str, Any], source: str) -> ItemDataset:
    def get(index: int) -> Item:
        item = Item({about["input"]: read_image(paths[index], about)})
        if labels is not None:
            item["labels"] = labels[index]
        return item

    return ItemDataset(len(paths), get, source=source, labels=labels)


def read_image(path: Path, about: Mapping[str, Any]) -> Tensor:
    """An image file as the model's input [C, H, W]. Raises `MergeidError` for a file that is no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata and palettes
            with Image.open(path) as image:
                return prepare(image, about)
    except MergeidError as error:
        raise MergeidError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise MergeidError(f"{path} cannot be read as an image (unknown format); repair or remove it") from error
    except Image.DecompressionBombError as error:
        raise MergeidError(
            f"{path} claims so many pixels that it could fill the memory ({told(error)}); make it smaller or remove it"
        ) from error
    except Exception as error:  # every format of Pillow raises kinds of its own on damaged files
        raise MergeidError(f"{path} cannot be read as an image ({told(error)}); repair or remove it") from error


def prepare(image: Image, about: Mapping[str, Any]) -> Tensor:
    """Resize the shorter side, crop the centre, scale to [0, 1] and normalise: [C, H, W] float32."""
    from PIL.Image import Resampling

    channels, height, width = about["size"]
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise MergeidError(
            f"the model takes images with {channels} channels, but image files have 1, 3 or 4; give the data as "
            ".safetensors or .npz"
        )
    image = _whole_numbers(image).convert(modes[channels])
    image = _shortened(image, height / width)
    how = getattr(Resampling, str(about.get("interpolation", "bilinear")).upper(), Resampling.BILINEAR)
    size = _resized((image.width, image.height), (width, height), float(about.get("crop_pct") or 1.0))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.resize(size, how).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(height, width, channels))
    return normalise(pixels.permute(2, 0, 1), about)


def _whole_numbers(image: Image) -> Image:
    """16-bit greys as 8-bit ones (Pillow's own conversion cuts them off at 255)."""
    from PIL import Image as images

    if image.mode == "F":
        raise MergeidError("a floating-point image has no defined range of values; give the data as .npz")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise MergeidError("a 32-bit integer image has no defined range of values; give the data as .npz")
    return images.fromarray((values / 257).round().astype(np.uint8))


def _shortened(image: Image, ratio: float) -> Image:
    """The centre of an image that is more than `LONGEST` times longer, in either direction, than `ratio` (height /
    width) asks for: resized as a whole it might fill the memory."""
    width, height = image.size
    if height > LONGEST * max(width * ratio, 1):
        most = math.ceil(LONGEST * width * ratio)
        top = (height - most) // 2
        return image.crop((0, top, width, top + most))
    if width > LONGEST * max(height / ratio, 1):
        most = math.ceil(LONGEST * height / ratio)
        left = (width - most) // 2
        return image.crop((left, 0, left + most, height))
    return image


def _resized(image: tuple[int, int], wanted: tuple[int, int], crop: float) -> tuple[int, int]:
    """(width, height) to resize to, of which the centre is cropped. Rounding down as torchvision and timm do."""
    enlarged = tuple(math.floor(side / crop) for side in wanted)
    if enlarged[0] / image[0] >= enlarged[1] / image[1]:
        return enlarged[0], max(int(image[1] * enlarged[0] / image[0]), wanted[1])
    return max(int(image[0] * enlarged[1] / image[1]), wanted[0]), enlarged[1]


def normalise(pixels: Tensor, about: Mapping[str, Any]) -> Tensor:
    """uint8 [..., C, H, W] to float32, by the model's mean and standard deviation."""
    mean = torch.tensor(about.get("mean", (0.0,)), dtype=torch.float32).reshape(-1, 1, 1)
    std = torch.tensor(about.get("std", (1.0,)), dtype=torch.float32).reshape(-1, 1, 1)
    return (pixels.float() / 255.0 - mean) / std
