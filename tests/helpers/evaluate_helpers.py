"""A small network with BatchNorm and dropout, data for it, and the task functions that an adapter would supply."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from mergeid.plugins import Batch, LossParts

CLASSES = 5
torch.set_num_threads(1)  # networks this small only wait for each other's threads


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(8, 7)
        self.bn3 = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return self.head(F.relu(self.bn3(self.hidden(self.drop(x)))))


class Items(Dataset):
    """`count` random 8 x 8 images with labels; float32, as real data would be."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 1, 8, 8, generator=generator) + torch.rand(count, 1, 1, 1, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    """A network whose parameters and BatchNorm statistics are all non-trivial."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (name.startswith("bn") and name.endswith("weight")):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.7)
    return model.to(dtype).eval()


def reversed_neurons(model: Net) -> Net:
    """The same function with its hidden neurons in reverse order: averaging the two meets a barrier."""
    turned = Net().to(next(model.parameters()).dtype).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, following in (("conv1", "conv2"), ("conv2", "hidden"), ("hidden", "head")):
        norm = {"conv1": "bn1", "conv2": "bn2", "hidden": "bn3"}[layer]
        for name in state:
            if name.startswith((f"{layer}.", f"{norm}.")) and state[name].dim():
                state[name] = state[name].flip(0)
        state[f"{following}.weight"] = state[f"{following}.weight"].flip(1)
    turned.load_state_dict(state)
    return turned


def forward(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"])


def loss(output: Tensor, batch: Batch) -> LossParts:
    labels = batch["labels"]
    return LossParts(
        F.cross_entropy(output, labels, reduction="none"),
        (output.argmax(-1) == labels).long(),
        torch.ones_like(labels),
    )


def runs(model: nn.Module, data: Tensor, classes: bool, outputs: Callable[[nn.Module, Batch], Any]) -> SimpleNamespace:
    """What a panel asks of the first model that was loaded. `classes`: the first output holds logits."""
    return SimpleNamespace(
        joined=None,
        adapter=None,
        example={"x": data[:2], "labels": torch.zeros(2)},
        inputs={"x": data[:2]},
        inputs_of=lambda batch: {k: v for k, v in batch.items() if k != "labels"},
        model=model,
        loss=lambda *_: 0.0 if classes else None,
        outputs=outputs,
        unread=frozenset(),
    )
