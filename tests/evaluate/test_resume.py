"""Data of two measurements are taken for the same only where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mergeid.evaluate.resume import digest_of


class Image:
    """As PIL's: an array on demand; its text holds an address."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @property
    def __array_interface__(self) -> Any:
        return self.values.__array_interface__


def digest(value: Any) -> str:
    return digest_of([], [[{"x": value}]], {})


@pytest.mark.parametrize("made", [np.asarray, Image, torch.from_numpy, lambda x: x.transpose(2, 1, 0)])
def test_one_pixel_of_an_image_counts(made: Callable[[Any], Any]) -> None:
    generator = np.random.default_rng(0)
    image = generator.standard_normal((3, 32, 32), dtype=np.float32)
    other = image.copy()
    other[1, 15, 16] += 1
    assert digest(made(image)) == digest(made(image.copy()))
    assert digest(made(image)) != digest(made(other))


def test_the_same_bytes_of_another_type_or_shape_are_other_data() -> None:
    x = np.zeros((2, 6), np.float32)
    assert len({digest(v) for v in (x, x.reshape(3, 4), x.view(np.int32), x[:, :4])}) == 4


def test_each_item_of_an_array_of_objects_counts() -> None:
    first, second = (np.array(["a"] * 1000 + [word] + ["a"] * 1000, object) for word in ("b", "c"))
    assert digest(first) == digest(first.copy()) != digest(second)


def test_the_colours_of_an_image_with_a_palette_count() -> None:
    pictures = pytest.importorskip("PIL.Image")

    def picture(red: int) -> Any:
        made = pictures.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
        made.putpalette([red, 0, 0] * 256)
        return made

    assert digest(picture(1)) == digest(picture(1)) != digest(picture(2))
