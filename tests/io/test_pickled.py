"""Pickled checkpoints: what is read of them, and what is said."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import load_checkpoint, load_state_dict
from timm.utils import CheckpointSaver, ModelEmaV3

import mergeid
from mergeid import MergeidError
from mergeid.io.opening import open_checkpoint


def test_training_checkpoint_in_a_tar_named_pickle(tmp_path: Path) -> None:
    """``.pth.tar`` is what many training scripts call torch.save's files."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        torch.save({"state_dict": {"w": torch.full((2,), value)}, "epoch": 3}, tmp_path / f"{name}.pth.tar")
    paths = [tmp_path / f"{n}.pth.tar" for n in "ab"]
    with pytest.raises(MergeidError, match="--allow-pickle"):
        mergeid.merge(*paths, output=tmp_path / "out.safetensors", match="never")
    mergeid.merge(*paths, output=tmp_path / "out.safetensors", match="never", allow_pickle=True)
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_every_usual_ending_with_the_wrapper_of_a_training_script(suffix: str, tmp_path: Path) -> None:
    """As Lightning writes them: the network is an attribute of the module that trains, with its settings beside."""
    networks = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
        networks.append(model.state_dict())
        state = {f"model.{k}": v for k, v in networks[-1].items()}
        more = {"epoch": 2, "hyper_parameters": {"lr": 0.1, "name": "x"}, "optimizer_states": [{"step": torch.ones(1)}]}
        torch.save({"state_dict": state, **more}, tmp_path / f"{name}{suffix}")
    paths = [tmp_path / f"{n}{suffix}" for n in "ab"]
    mergeid.merge(*paths, output=tmp_path / "out.safetensors", match="never", allow_pickle=True)
    merged = load_file(tmp_path / "out.safetensors")
    a, b = networks
    assert all(torch.equal(merged[f"model.{k}"], (a[k] + b[k]) / 2) for k in a if a[k].is_floating_point())
    assert mergeid.graph(paths[0], allow_pickle=True).spaces


def test_averaged_weights_of_a_training_checkpoint_are_read_and_that_is_said(tmp_path: Path) -> None:
    """As timm's own loader does by default."""
    state = {"state_dict": {"w": torch.ones(2)}, "state_dict_ema": {"w": torch.full((2,), 3.0)}}
    torch.save(state, tmp_path / "last.pth.tar")
    with pytest.warns(mergeid.MergeidWarning, match="state_dict_ema"):
        found = open_checkpoint(tmp_path / "last.pth.tar", allow_pickle=True)
    assert torch.equal(found.tensor("w"), load_state_dict(str(tmp_path / "last.pth.tar"))["w"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_torch_averages_is_merged_with_a_plain_one(wrapped: bool, tmp_path: Path) -> None:
    """Its weights lie under ``module.``, beside a count of the averages."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.update_parameters(network)
    state = averaged.state_dict()
    assert "n_averaged" in state
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "a.pth")
    plain = {k: v + 1 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(plain, tmp_path / "b.pth")
    for first, second in ("ab", "ba"):
        paths = [tmp_path / f"{name}.pth" for name in (first, second)]
        output = tmp_path / f"{first}{second}.safetensors"
        mergeid.merge(*paths, output=output, match="never", allow_pickle=True)
        merged = {k.removeprefix("module."): v for k, v in load_file(output).items()}
        assert merged.keys() == plain.keys()
        assert all(torch.allclose(merged[k], v - 0.5) for k, v in plain.items() if v.is_floating_point())


@pytest.mark.parametrize("key", ["ema", "ema_state_dict", "swa_model"])
def test_weights_that_may_be_averaged_are_named_where_others_are_read(tmp_path: Path, key: str) -> None:
    """Nothing said that a checkpoint holds two models."""
    torch.save({"model": {"w": torch.ones(2)}, key: {"w": torch.zeros(2)}, "epoch": 3}, tmp_path / "last.pth")
    with pytest.warns(mergeid.MergeidWarning, match=f"also holds '{key}'.*; those under 'model' are used"):
        found = open_checkpoint(tmp_path / "last.pth", allow_pickle=True)
    assert found.tensor("w").tolist() == [1, 1]


@pytest.mark.parametrize("averaged", [True, False], ids=["EMA", "no EMA"])
def test_checkpoints_as_the_training_script_of_timm_saves_them(averaged: bool, tmp_path: Path) -> None:
    """With its options, optimizer and, under another key, the averaged weights; of a wrapped model too."""
    paths, own = [], []
    for seed, prefix in enumerate(("", "module.")):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        average = ModelEmaV3(model) if averaged else None
        own.append({k: v.clone() for k, v in model.state_dict().items()})
        with torch.no_grad():
            for value in model.parameters():
                value.add_(1)
        place = tmp_path / f"run{seed}"
        place.mkdir()
        args = Namespace(model="test_vit", img_size=32, lr=1e-3, mean=None, crop_pct=[0.9])
        saver = CheckpointSaver(
            model, torch.optim.AdamW(model.parameters()), args=args, model_ema=average, checkpoint_dir=str(place),
            recovery_dir=str(place),
        )  # fmt: skip
        saver.save_checkpoint(0, metric=0.5)
        paths.append(place / "last.pth.tar")
        if prefix:  # as scripts that do not unwrap
            held = torch.load(paths[-1], weights_only=False)
            for key in {"state_dict", "state_dict_ema"} & held.keys():
                held[key] = {prefix + k: v for k, v in held[key].items()}
            torch.save(held, paths[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mergeid.merge(*paths, output=tmp_path / "out.safetensors", match="never", allow_pickle=True)
    said = [
        str(w.message) for w in caught if "averaged over training (state_dict_ema); those are used" in str(w.message)
    ]
    assert len(said) == 2 * averaged
    merged, oracle = load_file(tmp_path / "out.safetensors"), []
    for path in paths:
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        load_checkpoint(model, str(path))
        oracle.append(model.state_dict())
    assert all(torch.equal(merged[k], (oracle[0][k] + oracle[1][k]) / 2) for k in oracle[0])
    assert all(torch.equal(oracle[0][k], own[0][k] + (not averaged)) for k in own[0])


def test_a_pickle_that_needs_code_is_refused_still(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "args": Namespace(run=Path("x").resolve)}, tmp_path / "a.pth")
    with pytest.raises(MergeidError, match="more than tensors"):
        open_checkpoint(tmp_path / "a.pth", allow_pickle=True)
