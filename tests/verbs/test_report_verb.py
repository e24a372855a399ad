"""`report` on files: measured values reach the page, and nothing but the page is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import mergeid
from mergeid.errors import MergeidError


def test_bad_input_says_so() -> None:
    with pytest.raises(MergeidError, match="--points must be at least 3, got 2"):
        mergeid.report("a.safetensors", "b.safetensors", data="x.npz", points=2)
    with pytest.raises(MergeidError, match="save the live modules first"):
        mergeid.report(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), data=[])


@pytest.mark.slow
def test_report_of_two_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3)
        save_file(model.state_dict(), f"{name}.safetensors", metadata={"architecture": "timm/test_resnet"})
    random = np.random.default_rng(0)
    np.savez("x.npz", x=random.normal(size=(48, 3, 64, 64)).astype("float32"), labels=np.arange(48) % 3)
    before = {p.name for p in tmp_path.iterdir()}
    found = mergeid.report("a.safetensors", "b.safetensors", data="x.npz", output="page.html", points=3)
    assert {p.name for p in tmp_path.iterdir()} == before | {"page.html"}
    direct = mergeid.barrier("a.safetensors", "b.safetensors", data="x.npz", points=3, device="cpu")
    assert found.curves[0].label == "direct" and found.curves[0].losses == direct.losses
    assert found.prediction is not None and found.merge is not None and found.prediction.notes
    assert {*found.prediction.notes, *found.merge.notes} <= set(found.notes)
    page = Path("page.html").read_text(encoding="utf-8")
    assert all(f.sha256 in page for f in found.inputs) and len(found.inputs) == 2
    assert f"{direct.losses[0]:.4f}" in page and found.command in page.replace("&#39;", "'")
