"""How mergeid recognises, builds and feeds a KeywordNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from keyword_nets.network import BANDS, KeywordNet
from mergeid.errors import MergeidError
from mergeid.plugins import Architecture, Batch, LossParts, TensorTable

SIZES = {
    "small": {"channels": 16, "hidden": 24, "depth": 3, "words": 10},
    "large": {"channels": 64, "hidden": 128, "depth": 8, "words": 35},
}


class KeywordAdapter:
    name = "keyword-nets"

    def architectures(self) -> list[str]:
        return list(SIZES)

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """By the names of its tensors; the sizes are read off their shapes."""
        if not {"front.weight", "head.weight", "blocks.0.gated.weight"} <= set(table):
            return None
        channels, bands, _ = table["front.weight"].shape
        if bands != BANDS:
            return None
        hidden = table["blocks.0.gated.weight"].shape[0] // 2
        depth = sum(name.endswith(".gated.weight") for name in table)
        sizes = {"channels": channels, "hidden": hidden, "depth": depth, "words": table["head.weight"].shape[0]}
        named = next((name for name, known in SIZES.items() if known == sizes), "custom")
        return Architecture(self.name, named, sizes)

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        if name not in SIZES:
            raise MergeidError(f"unknown architecture {self.name}/{name}; expected one of {', '.join(SIZES)}")
        found = self.recognise(table, config, {}) if table else None
        return found or Architecture(self.name, name, SIZES[name])

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        with torch.device(device):
            return KeywordNet(**arch.options).eval()

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        return {name: name for name in model.state_dict() if name in table}

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        spectrograms = torch.randn(batch_size, BANDS, 50, generator=generator)
        return {"x": spectrograms, "labels": torch.randint(arch.options["words"], (batch_size,), generator=generator)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        labels = batch.get("labels")
        if labels is None:
            return None
        right = (output.argmax(1) == labels).long()
        return LossParts(cross_entropy(output, labels, reduction="none"), right, torch.ones_like(right))

    def preprocessing(self, arch: Architecture) -> Mapping[str, Any]:
        return {"kind": "spectrogram", "size": (BANDS, None)}

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        where = dict(axes)
        if "front.weight" in where:
            return "residual stream"
        gated = [tensor for tensor in where if tensor.endswith(".gated.weight")]
        return f"{gated[0].removesuffix('.gated.weight')} gated neurons" if len(gated) == 1 else None

    def companion_files(self, folder: Path) -> list[Path]:
        return []
