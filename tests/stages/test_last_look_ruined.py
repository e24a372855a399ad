"""Networks that do not merge: trained apart on Fashion-MNIST, and what the last look says of them."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mergeid
from mergeid import nn as mnn
from mergeid.errors import WillNotMerge

FASHION = Path("/usr/share/datasets/fashion-mnist")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FASHION.exists(), reason="dataset-fashion-mnist is not installed"),
]


@dataclass
class Images:
    x: torch.Tensor
    y: torch.Tensor


def images(split: str, count: int, side: int = 32) -> Images:
    x, y = (
        np.frombuffer(gzip.decompress((FASHION / f"{split}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=skip)
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    pixels = torch.from_numpy(x.reshape(-1, 1, 28, 28)[:count].astype(np.float32) / 255 - 0.29) / 0.35
    edge = (side - 28) // 2
    padded = nn.functional.pad(pixels, (edge,) * 4, value=-0.29 / 0.35)
    return Images(padded, torch.from_numpy(y[:count].astype(np.int64)))


def trained(model: nn.Module, data: Images, seed: int, epochs: int, rate: float) -> nn.Module:
    steps = epochs * (len(data.x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.x), generator=order)[: len(data.x) // 64 * 64].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[index]), data.y[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, data: Images) -> float:
    with torch.no_grad():
        right = [(model(x).argmax(1) == y) for x, y in zip(data.x.split(250), data.y.split(250), strict=True)]
    return torch.cat(right).float().mean().item()


def nfnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_nfnet", in_chans=1, num_classes=10)


def asymmetric_vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32)
    mnn.asymmetrise(model, "w", generator=torch.Generator().manual_seed(7))
    return model


@pytest.mark.parametrize(("make", "rate"), [(nfnet, 3e-3), (asymmetric_vit, 2e-3)])
def test_no_ruined_merge_is_written(make, rate, tmp_path):
    train, test = images("train", 6000), images("t10k", 2000)
    paths, ends = [], []
    for seed in (1, 2):
        model = trained(make(seed), train, seed, 3, rate)
        ends.append(accuracy(model, test))
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, paths[-1])
    data = tmp_path / "data.npz"
    np.savez(data, x=train.x[:512].numpy())
    arch = "timm/test_nfnet" if make is nfnet else "timm/test_vit"
    assert min(ends) > 0.75, ends
    for match in ("auto", "always", "never"):
        out = tmp_path / f"{match}.safetensors"
        how = {"data": data, "match": match, "arch": arch, "output": out}
        try:
            done = mergeid.merge(*paths, **how)
        except WillNotMerge as error:
            assert "--refuse-above is 0.5" in str(error) and not out.exists()
            done = mergeid.merge(*paths, **how, force=True)
            refused = True
        else:
            refused = False
        merged = make(0)
        merged.load_state_dict(load_file(out))
        found = accuracy(merged.eval(), test)
        print(make.__name__, match, ends, done.comparison, "refused" if refused else "written", found)
        assert refused or found > min(ends) - 0.2
