"""Predictions without data: random inputs as the model takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.models.load import load_model
from mergeid.prediction.random_inputs import random_examples
from mergeid.request.request import Example, Reading, Run


class Settings(nn.Module):
    """Numbers, switches and words are the same for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, scale: float = 1.0, on: bool = True, *, time: Tensor, words: tuple = ()) -> Tensor:
        assert isinstance(scale, float) and isinstance(on, bool) and time.dim() == 0 and words == ("a",)
        return self.b(self.a(x * scale + time).relu())


class Graph(nn.Module):
    """Nodes and edges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.a(x).relu()
        return self.b(torch.zeros_like(h).index_add(0, target, h[source]))


class Sparse(Graph):
    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.b(torch.sparse.mm(edges, self.a(x)).relu())


class Sorted(Graph):
    """Sequences from the longest on."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.b(nn.utils.rnn.pad_packed_sequence(packed._replace(data=self.a(packed.data).relu()))[0].mean(0))


class Nested(Graph):
    def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
        return self.b(self.a(batch["x"][0]).relu() * batch["x"][1])


EDGES = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
DENSE = torch.eye(5) + torch.ones(5, 5).triu(2)
CASES = {
    "settings": (
        Settings,
        {"x": torch.randn(4, 6), "scale": 2.0, "on": True, "time": torch.tensor(3), "words": ("a",)},
    ),
    "graph": (Graph, (torch.randn(6, 6), EDGES)),
    "sparse": (Sparse, (torch.randn(5, 6), DENSE.to_sparse())),
    "sorted": (Sorted, (torch.randn(3, 5, 6), torch.tensor([5, 3, 2]))),
    "nested": (Nested, ({"x": [torch.randn(4, 6), torch.rand(4, 1)]},)),
    "unequal": (Sparse, (torch.randn(5, 6), DENSE)),
}


@pytest.mark.parametrize("kind", CASES)
def test_models_run_on_random_inputs(kind: str) -> None:
    make, example = CASES[kind]
    torch.manual_seed(0)
    a, b = make().eval(), make().eval()
    found = mergeid.predict(a, b, example_inputs=example)
    assert found.outlooks and found.examples > 0
    same = mergeid.predict(a, a, example_inputs=example)
    assert all(o.nats.expected < 1e-3 for o in same.outlooks)


@pytest.mark.parametrize(("kind", "whole"), [("settings", False), ("nested", False), ("graph", True), ("sorted", True)])
def test_by_examples_where_the_model_takes_such(kind: str, whole: bool) -> None:
    make, example = CASES[kind]
    loaded = load_model(make().eval(), Reading(example=Example.of(example, ())), Run())
    assert random_examples(loaded).whole == whole


def test_whole_inputs_as_data() -> None:
    make, example = CASES["graph"]
    data = [(torch.randn(n, 6), EDGES % n) for n in 4 * (4, 5, 6, 7)]
    found = mergeid.predict(make().eval(), make().eval(), example_inputs=example, data=data)
    assert found.examples == sum(len(x) for x, _ in data)
    with pytest.raises(mergeid.MergeidError, match="--try puts examples into batches"):
        mergeid.predict(make().eval(), make().eval(), example_inputs=example, data=data, trial=True)
