"""Data sets that say they are longer than anybody could count: some examples are drawn, and no others are looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.data import load_data
from mergeid.data.batching import SHUFFLED, drawn
from mergeid.errors import MergeidError
from mergeid.plugins import Architecture, get_adapter

X = {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))}


class Endless:
    """Map-style, with a length that no list has."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item, self.seen = item, set[int]()

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> Any:
        self.seen.add(index)
        return self.item(index)


def test_a_draw_from_many_is_seeded_and_in_order() -> None:
    one, again, other = (drawn(10**12, 50, seed) for seed in (0, 0, 1))
    assert one == again == sorted(set(one)) and one != other and len(one) == 50
    assert one[0] < 10**12 // 10 and one[-1] > 9 * 10**12 // 10  # from everywhere
    assert len(drawn(SHUFFLED + 1, 9, 0)) == 9


def test_records_of_text_are_drawn_before_they_are_read() -> None:
    data = Endless(lambda i: {"text": f"number {i}"})
    config = {"model_type": "bert", "vocab_size": 30522}
    arch = Architecture("transformers", "bert", {"config": config, "model_class": "BertForMaskedLM"})
    with pytest.raises(MergeidError, match="tokenizer"):  # there is none, and it took no time to find out
        load_data(data, adapter=get_adapter("transformers"), arch=arch, limit=20)
    assert 0 < len(data.seen) < 100


def test_pictures_are_drawn() -> None:
    data = Endless(lambda i: (torch.full((3, 64, 64), float(i % 7)), i % 4))
    arch = Architecture("timm", "resnet18", {"num_classes": 4})
    assert len(load_data(data, adapter=get_adapter("timm"), arch=arch, limit=20)) == 20
    assert len(data.seen) < 100


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_live_modules_are_run_on_as_many_as_the_limit_says() -> None:
    data = Endless(lambda i: {"x": torch.randn(4, generator=torch.Generator().manual_seed(i))})
    assert mergeid.plan(Net().eval(), Net().eval(), data=data, example_inputs=X, limit=24).examples == 24
    assert len(data.seen) < 40
