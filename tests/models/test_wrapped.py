"""Live modules as users hold them: wrapped by torch, with data as torch's data sets and loaders give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import mergeid
from mergeid.errors import MergeidError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(48) % 3
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("first", [True, False])
def test_one_of_two_is_wrapped(kind: str, first: bool) -> None:
    a, b = made(0), made(0)
    graph = mergeid.graph(a, X)
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    pair = (WRAPPERS[kind](a), b) if first else (a, WRAPPERS[kind](b))
    result = mergeid.merge(*pair, example_inputs=X)
    assert result.state.keys() == a.state_dict().keys()
    assert all(torch.equal(result.state[k], v) for k, v in a.state_dict().items())
    assert any("not all models are wrapped" in note for note in result.notes)


def test_equal_wrappers_keep_their_names() -> None:
    a, b = (WRAPPERS["parallel"](made(seed)) for seed in range(2))
    assert mergeid.merge(a, b, example_inputs=X).state.keys() == a.state_dict().keys()


DATA: dict[str, Any] = {
    "pairs": TensorDataset(ROWS, CLASSES),
    "loader": DataLoader(TensorDataset(ROWS, CLASSES), batch_size=8, shuffle=True),
    "lists": [[x, int(c)] for x, c in zip(ROWS, CLASSES, strict=True)],
    "arrays": [(x.numpy(), c.numpy()) for x, c in zip(ROWS, CLASSES, strict=True)],
    "batches": [(ROWS[i : i + 2], CLASSES[i : i + 2]) for i in range(0, 48, 2)],
}


@pytest.mark.parametrize("kind", DATA)
def test_labels_come_last_as_torch_s_data_sets_have_them(kind: str) -> None:
    a, b = made(0), made(1)
    named = [{"arg0": x, "labels": c} for x, c in zip(ROWS, CLASSES, strict=True)]
    expected = mergeid.barrier(a, b, example_inputs=X, data=named)
    if kind != "batches":
        assert mergeid.barrier(a, b, example_inputs=X, data=DATA[kind]).losses == pytest.approx(expected.losses)
    options = {"example_inputs": X, "match": "always", "repair": False, "force": True}
    state = mergeid.merge(a, b, data=DATA[kind], **options).state
    if kind not in ("batches", "loader"):
        other = mergeid.merge(a, b, data=named, **options).state
        assert all(torch.equal(v, other[k]) for k, v in state.items())


class Two(nn.Module):
    """Its second input is a whole number, and no label."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.b = nn.Linear(6, 8), nn.Embedding(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b((self.a(x) + self.t(t)).relu())


def test_what_the_example_has_is_an_input() -> None:
    data = TensorDataset(ROWS, CLASSES)
    assert mergeid.plan(Two(), Two(), example_inputs=(X, CLASSES[:4]), data=data).spaces


def test_a_loader_that_makes_its_own_batches_is_refused_in_a_sentence() -> None:
    loader = DataLoader(TensorDataset(ROWS, CLASSES), collate_fn=lambda items: torch.stack([x for x, _ in items]))
    with pytest.raises(MergeidError, match=r"a collate_fn of its own; expected its dataset, or list\(loader\)"):
        mergeid.merge(made(0), made(1), example_inputs=X, data=loader)
    assert mergeid.plan(made(0), made(1), example_inputs=X, data=list(loader)).spaces


def test_the_only_output_has_no_name() -> None:
    with pytest.raises(MergeidError, match="'logits', but the model returns one tensor; leave outputs out"):
        mergeid.graph(made(0), X, outputs=["logits"])
