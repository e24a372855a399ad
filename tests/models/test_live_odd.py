"""Live modules and their data, as people have them in Python: read right, or refused in one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mergeid
from mergeid.errors import MergeidError

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Made(Dataset[Any]):
    """24 items, or as many as it says."""

    def __init__(self, get: Callable[[int], Any], count: Any = 24) -> None:
        self.get, self.count = get, count

    def __len__(self) -> int:
        return self.count  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Any:
        return self.get(index)


def losses(data: Any) -> list[float]:
    return list(mergeid.barrier(net(0), net(1), data=data, points=3, example_inputs=X[:4]).losses)


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(X, Y),
        list(zip(X, Y, strict=True)),
        [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
        Made(lambda i: (X[i], Y[i])),
    ],
    ids=["tensors", "pairs", "whole numbers", "loader", "dataset"],
)
def test_pairs_of_input_and_label(data: Any) -> None:
    """They were two inputs of a forward that takes one, and a loader could not be indexed."""
    named = [{"arg0": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    assert losses(data) == pytest.approx(losses(named), abs=1e-12)
    wanted = mergeid.plan(net(0), net(1), data=list(X), example_inputs=X[:4])
    found = mergeid.plan(net(0), net(1), data=data, example_inputs=X[:4])
    assert found.to_json()["spaces"] == wanted.to_json()["spaces"]  # type: ignore[index]


def test_a_second_input_stays_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(0)

        def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            return self.inner(x) * (scale if isinstance(scale, float) else scale[:, None])

    mergeid.plan(Two(), Two(), data=[(x, torch.tensor(2.0)) for x in X], example_inputs=X[:4])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, "numpy"])
def test_a_mask_is_no_label(kind: Any) -> None:
    """Where the forward has a place for it; padding counted, as if there were no mask."""
    seen: list[bool] = []

    class Pooled(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.inner = nn.Embedding(9, 4), net(seed)

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            seen.append(mask is not None)
            found = self.embed(ids)
            return self.inner(
                found.mean(1) if mask is None else (found * mask[..., None]).sum(1) / mask.sum(1)[:, None]
            )

    ids, mask = torch.arange(240).view(24, 10) % 9, torch.arange(10) < torch.arange(1, 25)[:, None]
    given = [m.numpy() if kind == "numpy" else m.to(kind) for m in mask]
    mergeid.plan(Pooled(0), Pooled(1), data=list(zip(ids, given, strict=True)), example_inputs=ids[:4])
    assert any(seen)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Made(lambda i: 1 // 0), "example 0 of the data cannot be read .ZeroDivisionError"),
        (Made(lambda i: X[i] if i != 7 else {}[i]), "example 7 of the data cannot be read .KeyError"),
        (Made(lambda i: X[i] if i != 7 else [][i]), "example 7 of the data cannot be read .IndexError"),
        (Made(lambda i: next(iter(()))), "example 0 of the data cannot be read .StopIteration"),
        (Made(lambda i: X[i], -1), "the dataset Made has no length"),
        (Made(lambda i: X[i].to("meta")), "the input 'arg0' is on the meta device and holds no values"),
        (Made(lambda i: X[i] * float("nan")), "nothing but NaN or infinite numbers on the data; give examples"),
        (Made(lambda i: (X[i], Y[i]) if i < 20 else (X[i],)), "example 20 of the data has no label"),
        (DataLoader(list(X), collate_fn=list), "a DataLoader with a collate_fn of its own; expected its dataset"),
        ({1, 2}, "is of type set; expected a list of examples"),
        (net(0), "is of type Sequential; expected a list of examples"),
        (itertools.count(), "is of type count; expected a list of examples"),
    ],
)
def test_data_that_is_refused(data: Any, message: str) -> None:
    with pytest.raises(MergeidError, match=message) as caught:
        mergeid.plan(net(0), net(1), data=data, example_inputs=X[:4])
    assert len(str(caught.value)) < 600


def test_modules_without_values() -> None:
    for never in ("never", "auto"):
        for other in (net(1), net(1).to("meta")):
            with pytest.raises(MergeidError, match=r"'0\.weight' of Sequential is on the meta device"):
                mergeid.merge(net(0).to("meta"), other, match=never, example_inputs=X[:4])
    with pytest.raises(MergeidError, match="'weight' of LazyLinear has no shape yet"):
        mergeid.merge(nn.LazyLinear(3), nn.LazyLinear(3), match="never")
    with pytest.raises(MergeidError, match="example_inputs is an iterator; expected a tensor"):
        mergeid.graph(net(0), example_inputs=iter(X))


def test_scripted_modules() -> None:
    """What they hold could not be put back after a verb."""
    a, b = net(0), net(1)
    scripted = mergeid.merge(torch.jit.script(a), torch.jit.script(b), match="never").state
    plain = mergeid.merge(a, b, match="never").state
    assert scripted is not None and plain is not None
    assert all(torch.equal(scripted[k], plain[k]) for k in plain)
