"""The command that a plan, a prediction or a ranking ends with: it runs as it is printed, and keeps what was asked."""

from __future__ import annotations

import inspect
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mergeid.commands.cli import run
from mergeid.errors import MergeidWarning

Said = Callable[..., str]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command line beside a.pth, its near copy b.pth, and images/ of 32 x 32 pixels; what it printed."""
    import timm

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    state = model.state_dict()
    torch.save(state, "a.pth")
    near = {k: v + 0.01 * v.std() if v.is_floating_point() and v.numel() > 1 else v for k, v in state.items()}
    torch.save(near, "b.pth")
    save_file(near, "b.safetensors")
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")

    def call(words: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MergeidWarning)  # images that are enlarged
            code = run(shlex.split(words))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def following(printed: str) -> str:
    """The command of the line ``Next:``, which is the last one, and where nothing stands behind the command."""
    said, _, command = printed.splitlines()[-1].partition(": mergeid ")
    assert said == "Next" or said.startswith("Next, to ")
    return command


KEPT = "--data images --allow-pickle --limit 32 --image-size 32"


def test_the_command_after_a_plan(said: Said, tmp_path: Path) -> None:
    command = following(said(f"plan a.pth b.pth {KEPT} -o plan.json --match never"))
    assert set(KEPT.split()) <= set(command.split()) and command.endswith("-o merged.safetensors")
    assert "--match never" in command and "plan.json" not in command
    said(command)
    assert (tmp_path / "merged.safetensors").exists()
    again = following(said(f"plan a.pth b.pth {KEPT}"))
    assert again.endswith("-o merged-2.safetensors"), "a name that nothing has yet"


def test_the_commands_after_a_prediction(said: Said, tmp_path: Path) -> None:
    first = following(said("predict a.pth b.pth --allow-pickle --tolerate 0.02"))
    assert first.startswith("predict a.pth b.pth") and "--tolerate 0.02" in first
    second = following(said(f"{first.replace('DATA', 'images')} --limit 32 --image-size 32"))
    assert second.endswith("--try") or second.startswith("merge ")
    said(second)
    tried = said(f"predict a.pth b.pth {KEPT} --try")
    assert "in a trial" in tried
    based = following(said(f"predict a.pth b.pth {KEPT} --base b.safetensors --try"))
    assert "--base" not in based, "a plain average refuses it"
    command = following(tried)
    assert command.startswith("merge a.pth b.pth ") and set(KEPT.split()) <= set(command.split())
    said(command)
    assert (tmp_path / "merged.safetensors").exists()


def test_the_command_after_a_plan_of_models_that_will_not_merge() -> None:
    from mergeid.commands.plan import _next
    from mergeid.commands.terminal import Call
    from mergeid.verbs.plan import plan

    call = Call(plan, inspect.signature(plan).bind_partial(data="images", allow_pickle=True))
    printed = _next(SimpleNamespace(verdict="will not merge"), call, "a.pth", "b.pth")  # type: ignore[arg-type]
    assert following(printed) == "predict a.pth b.pth --data images --allow-pickle"


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
def test_the_command_after_a_report(said: Said, tmp_path: Path, kind: str) -> None:
    """It makes the merge where nothing lies yet, of the models' own kind."""
    names = [f"{name}.{kind}" for name in "ab"]
    if kind != "pth":
        for name, place in zip("ab", names, strict=True):
            place = f"{place}/model.safetensors" if kind == "folder" else place
            (tmp_path / place).parent.mkdir(exist_ok=True)
            save_file(torch.load(tmp_path / f"{name}.pth"), tmp_path / place)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged.safetensors").touch()
    command = following(said(f"report {' '.join(names)} {KEPT} --points 3 --no-merge -o page.html"))
    assert command.endswith("-o merged-2" if kind == "folder" else "-o merged-2.safetensors")
    said(command)


def test_the_command_after_a_ranking(said: Said, tmp_path: Path) -> None:
    printed = said(f"rank a.pth b.pth b.safetensors {KEPT} --try")
    said(following(printed))
    assert (tmp_path / "merged.safetensors").exists()
