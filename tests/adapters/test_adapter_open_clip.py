"""open_clip's folders: recognised by their config, aligned and merged, and loaded again by open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeid
from mergeid import MergeidError

pytest.importorskip("open_clip")
VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
CONFIG: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}


def _saved(folder: Path, seed: int) -> Path:
    import open_clip

    torch.manual_seed(seed)
    folder.mkdir()
    state = {k: t.contiguous() for k, t in open_clip.CLIP(**CONFIG).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
    return folder


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def _features(folder: Path) -> torch.Tensor:
    import open_clip

    model = open_clip.CLIP(**CONFIG).eval()
    model.load_state_dict(_state(folder))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (2, 12), generator=g)
    ids[:, -1] = 63
    with torch.no_grad():
        return torch.cat(model(torch.randn(2, 3, 32, 32, generator=g), ids)[:2])


def test_scrambled_folder_is_aligned_and_merged_back(tmp_path: Path) -> None:
    a = _saved(tmp_path / "a", 0)
    mergeid.scramble(a, output=tmp_path / "b", seed=1)
    one, two = _state(a), _state(tmp_path / "b")
    for tower in ("visual.", "transformer."):
        assert any(k.startswith(tower) and not torch.equal(t, two[k]) for k, t in one.items())
    torch.testing.assert_close(_features(tmp_path / "b"), _features(a), rtol=1e-4, atol=1e-5)
    mergeid.merge(a, tmp_path / "b", output=tmp_path / "out")
    for key, value in _state(tmp_path / "out").items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "open_clip_config.json").is_file()


def test_towers_that_differ_are_named(tmp_path: Path) -> None:
    a, b = (_saved(tmp_path / n, 0) for n in "ab")
    changed = {"model_cfg": {**CONFIG, "vision_cfg": {**VISION, "ls_init_value": None, "pool_type": "avg"}}}
    (b / "open_clip_config.json").write_text(json.dumps(changed))
    with pytest.raises(MergeidError, match=r"vision_cfg\.pool_type"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")
