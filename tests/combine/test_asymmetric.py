"""Averages of asymmetric layers are those of what the layers compute with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.combine.asymmetric import compared, effective_averages, note

Layer = dict[str, Tensor]


def layer(seed: int, mask: Tensor | None = None, name: str = "w") -> Layer:
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(4, 3, generator=g), f"{name}_fixed": torch.randn(4, 3, generator=g)}
    if mask is not None:
        made[f"{name}_mask"] = mask
    return made


def effective(x: Layer, name: str = "w") -> Tensor:
    return x[f"{name}_fixed"] + x.get(f"{name}_mask", torch.ones(4, 3)) * x[name]


FIRST = (torch.arange(12).reshape(4, 3) % 2).float()
OTHER = (torch.arange(12).reshape(4, 3) % 3 > 0).float()


def averages(models: Sequence[Layer], base: Layer | None = None) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    bases: list[Tensor | None] = []

    def merged(name: str, tensors: list[Tensor], origin: Tensor | None) -> Tensor:
        assert name == "w"
        bases.append(origin)
        return torch.stack([t.double() for t in tensors]).mean(0)

    reads = [m.__getitem__ for m in models]
    return effective_averages(models[0], reads, merged, None if base is None else base.__getitem__), bases


def test_layers_with_other_masks_are_averaged_in_their_effective_weights() -> None:
    a, b, c = layer(0, FIRST), layer(1, FIRST), layer(2, OTHER)
    found, bases = averages([a, b, c])
    expected = (effective(a) + effective(b) + effective(c)) / 3
    torch.testing.assert_close(effective(found), expected)
    torch.testing.assert_close(found["w"], expected)
    assert found["w"].dtype == a["w"].dtype and not found["w_fixed"].any() and bool((found["w_mask"] == 1).all())
    assert bases == [None]


def test_the_base_is_read_in_its_effective_weights_too() -> None:
    base = layer(3, OTHER)
    _, (origin,) = averages([layer(0, FIRST), layer(1, OTHER)], base)
    assert origin is not None and torch.equal(origin, effective(base))


def test_layers_of_one_mask_or_of_none_are_left_to_the_average() -> None:
    assert averages([layer(0, FIRST), layer(1, FIRST)])[0] == {}
    assert averages([layer(0), layer(1)])[0] == {}


def test_a_plan_says_what_is_shared() -> None:
    a, b = layer(0, FIRST), layer(1, FIRST)
    shared = {**b, "w_fixed": a["w_fixed"]}
    assert compared({"w": a["w"]}, b) == []
    assert "the same fixed parts" in compared(a, shared)[0] and "all 1" in compared(a, shared)[0]
    for other in (b, {**shared, "w_mask": OTHER}, {"w": b["w"]}):
        (said,) = compared(a, other)
        assert "1 of 1" in said and "'w'" in said
    two = {**a, **layer(5, FIRST, "v")}
    assert "1 of 2" in compared(two, {**two, "w_fixed": b["w_fixed"]})[0]


def test_the_note_counts_layers() -> None:
    assert note([]) == [] and note(["w", "w_fixed"]) == []
    assert note(["w", "w_fixed", "w_mask", "v", "v_fixed", "v_mask"])[0].startswith("2 asymmetric layers")
