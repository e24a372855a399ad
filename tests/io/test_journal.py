"""Work that was stopped goes on where it was, and only the same work does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import merge_checkpoints
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from writing import write_checkpoint

from mergeid.basics import stopping
from mergeid.errors import MergeidError
from mergeid.io import stream
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.journal import NAME, Journal
from mergeid.io.opening import open_checkpoint
from mergeid.io.stream import CheckpointWriter
from mergeid.methods.statistics import Gram
from mergeid.models.slices import Slice, stacked
from mergeid.request.request import Output


class Stopped(BaseException):
    """As a signal does, in the middle of anything."""


def left(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.mergeid-tmp"))


def begun(output: Path, steps: list[str]) -> Path:
    """Work on an output of which these steps are done, stopped."""
    journal = Journal(output, {"models": ["a"]}, resume=True)
    journal.staged.mkdir()
    for step in steps:
        journal.note(step, {"name": step})
    journal.commit()
    journal.note("never secured")
    journal.close(failed=True)
    return journal.folder


@given(steps=st.lists(st.text(max_size=8), unique=True), torn=st.integers(0, 40))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_committed_is_known_again(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], torn: int
) -> None:
    """Also where its writer was killed in the middle of a line: then all but that line."""
    output = tmp_path_factory.mktemp("work") / "out"
    folder = begun(output, steps)
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole + b'{"step":"half", "value": [1, 2, 3, 4, 5, 6]}'[:torn])
    again = Journal(output, {"models": ["a"]}, resume=True)
    assert again.resumed and again.folder == folder and again.steps == {s: {"name": s} for s in steps}
    again.note("last")
    again.commit()
    again.close(failed=True)
    assert [json.loads(x) for x in (folder / NAME).read_bytes().splitlines()][-1]["step"] == "last"
    third = Journal(output, {"models": ["a"]}, resume=True)
    assert "last" in third and "never secured" not in third
    third.close()
    assert not left(output.parent)


def test_other_work_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    begun(tmp_path / "out", ["one"])
    with pytest.raises(MergeidError, match=r"--resume: what was interrupted at .*out had other models; repeat"):
        Journal(tmp_path / "out", {"models": ["b"]}, resume=True)
    elsewhere = Journal(tmp_path / "another", {"models": ["a"]}, resume=True)
    assert not elsewhere.resumed
    elsewhere.close()
    fresh = Journal(tmp_path / "out", {"models": ["b"]})
    assert not fresh.resumed and len(left(tmp_path)) == 2
    fresh.forget_others()
    assert left(tmp_path) == [fresh.folder]
    fresh.close()


def test_nobody_takes_over_work_that_somebody_does(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from mergeid.io.journal import Journal\n"
        "j = Journal(pathlib.Path(sys.argv[1]), {'models': ['a']}); j.staged.mkdir()\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(MergeidError, match="is being written by another process"):
            Journal(tmp_path / "out", {"models": ["a"]}, resume=True)
        own = Journal(tmp_path / "out", {"models": ["a"]})
        own.forget_others()
        assert len(left(tmp_path)) == 2
        own.close()
        other.kill()
        other.wait()
    again = Journal(tmp_path / "out", {"models": ["a"]}, resume=True)
    assert again.resumed
    again.close()


def models(folder: Path, count: int = 6, size: tuple[int, int] = (40, 50)) -> tuple[Path, Path]:
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layer{i}.weight": torch.randn(size, generator=generator).bfloat16() for i in range(count)}
        save_file({**tensors, "steps": torch.tensor([1, 2 + seed])}, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


@pytest.fixture(autouse=True)
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "COMMIT", 4000)


def stopping_at(call: int) -> Callable[[int, int], None]:
    """A listener to progress that stops the work after so many tensors."""
    calls = [0]

    def told(done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise Stopped

    return told


@pytest.mark.parametrize("method", ["linear", "slerp", "dare_ties"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_merge_goes_on_to_the_same_bytes(tmp_path: Path, method: str, name: str) -> None:
    """Stopped after every tensor in turn; what was done already is not done again."""
    a, b = models(tmp_path)
    how = {"method": method, "base": a if method == "dare_ties" else None, "seed": 3}
    whole = tmp_path / "whole" / name
    whole.parent.mkdir()
    merge_checkpoints(a, b, whole, **how)
    for at in range(1, 7):
        place = tmp_path / f"{at}"
        place.mkdir()
        with pytest.raises(Stopped):
            merge_checkpoints(a, b, place / name, resume=True, progress=stopping_at(at), **how)
        (folder,) = left(place)
        lines = (folder / NAME).read_bytes().splitlines()
        done = [json.loads(line)["step"] for line in lines[1:]]
        assert len(done) >= at - 1
        for file in folder.glob("output*"):
            assert file.exists()
        merge_checkpoints(a, b, place / name, resume=True, **how)
        ours = [p for p in sorted(place.rglob("*")) if p.is_file()]
        theirs = [p for p in sorted(whole.parent.rglob("*")) if p.is_file()]
        assert [p.relative_to(place) for p in ours] == [p.relative_to(whole.parent) for p in theirs]
        assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]
        assert not left(place)


def test_a_merge_of_other_models_does_not_go_on(tmp_path: Path) -> None:
    a, b = models(tmp_path)
    with pytest.raises(Stopped):
        merge_checkpoints(a, b, tmp_path / "out", resume=True, progress=stopping_at(3))
    with pytest.raises(MergeidError, match="other settings; repeat its command"):
        merge_checkpoints(a, b, tmp_path / "out", weights=[0.3, 0.7], resume=True)
    os.utime(b, ns=(1, 1))
    with pytest.raises(MergeidError, match=r"weight files \(they were changed\)"):
        merge_checkpoints(a, b, tmp_path / "out", resume=True)
    merge_checkpoints(a, b, tmp_path / "out")
    assert not left(tmp_path)


def layers(*order: int) -> Any:
    """Opens a stack of single layers."""

    def opened(work: Path) -> Checkpoint:
        model = open_checkpoint(work / "a")
        return stacked([Slice(model, i, i + 1) for i in order])

    return opened


def with_alpha(alpha: float) -> Any:
    """Opens a model with an adapter of that α."""

    def opened(work: Path) -> Checkpoint:
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        (work / "adapter" / "adapter_config.json").write_text(json.dumps(told))
        return open_checkpoint(f"{work / 'a'}+{work / 'adapter'}")

    return opened


def in_blocks(rows: int) -> Any:
    """Opens a float8 model with a scale for so many rows."""

    def opened(work: Path) -> Checkpoint:
        told = {"quantization_config": {"weight_block_size": [rows, 50]}}
        (work / "q" / "config.json").write_text(json.dumps(told))
        return open_checkpoint(work / "q", dequantise=True)

    return opened


@pytest.mark.filterwarnings("ignore:both models are the same file")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (layers(0, 1), layers(0, 2)),
        (layers(0, 1), layers(1, 0)),
        (with_alpha(1), with_alpha(4)),
        (in_blocks(20), in_blocks(40)),
    ],
    ids=["slices", "order of slices", "alpha", "dequantise"],
)
def test_a_merge_of_the_same_files_read_in_another_way_does_not_go_on(tmp_path: Path, before: Any, after: Any) -> None:
    tensors = {f"model.layers.{i}.weight": torch.full((40, 50), float(i)) for i in range(4)}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    factor = "base_model.model.model.layers.1.lora_{}.weight"
    (tmp_path / "adapter").mkdir()
    factors = {factor.format("A"): torch.ones(2, 50), factor.format("B"): torch.ones(40, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "q").mkdir()
    quantised = {f"{i}.weight": torch.ones(40, 50).to(torch.float8_e4m3fn) for i in range(3)}
    scales = {f"{name}_scale": torch.ones(1, 1) for name in quantised}
    save_file({**quantised, **scales}, tmp_path / "q" / "model.safetensors")

    def merged(opened: Any, name: str, **how: Any) -> None:
        merge_checkpoints(opened(tmp_path), opened(tmp_path), tmp_path / name, **how)

    with pytest.raises(Stopped):
        merged(before, "out", progress=stopping_at(2), resume=True)
    with pytest.raises(MergeidError, match=r"had other parts of the models \(slices, adapters"):
        merged(after, "out", resume=True)
    merged(before, "out", resume=True)
    merged(before, "whole")
    resumed, whole = (tmp_path / n / "model.safetensors" for n in ("out", "whole"))
    assert resumed.read_bytes() == whole.read_bytes() and not left(tmp_path)


def test_a_merge_with_other_data_does_not_go_on(tmp_path: Path) -> None:
    a, b = models(tmp_path)
    measured = [{"layer0.weight": Gram(torch.eye(50), 1)}, {"layer0.weight": Gram(2 * torch.eye(50), 1)}]
    with pytest.raises(Stopped):
        merge_checkpoints(a, b, tmp_path / "out", statistics=measured, resume=True, progress=stopping_at(3))
    with pytest.raises(MergeidError, match="had other statistics of the data"):
        merge_checkpoints(a, b, tmp_path / "out", statistics=measured[::-1], resume=True)
    merge_checkpoints(a, b, tmp_path / "out", statistics=measured, resume=True)
    assert not left(tmp_path)


def test_without_resume_nothing_is_kept(tmp_path: Path) -> None:
    a, b = models(tmp_path)
    with pytest.raises(Stopped):
        merge_checkpoints(a, b, tmp_path / "out", progress=stopping_at(3))
    assert not left(tmp_path) and not any("mergeid-tmp" in str(p) for p in stopping._temporary)


@given(most=st.integers(1, 5000), sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_of_a_size_hold_all_tensors(
    tmp_path_factory: pytest.TempPathFactory, most: int, sizes: list[int]
) -> None:
    """Every file holds as much as fits and no more, or one tensor alone; the index says what lies where."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    tensors = {f"t{i}": torch.full((n, 3), float(i)) for i, n in enumerate(sizes)}
    write_checkpoint(folder, tensors.items(), like=Checkpoint.from_tensors(tensors), shard_size=most)
    files = sorted(folder.glob("*.safetensors"))
    found = {n: t for f in files for n, t in load_file(f).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
    held = []
    for file in files:
        with safe_open(file, "pt") as one:
            held.append([tensors[n].nbytes for n in sorted(one.keys(), key=list(tensors).index)])
    assert all(sum(group) <= most or len(group) == 1 for group in held)
    assert all(sum(x) + y[0] > most for x, y in zip(held, held[1:], strict=False)), "the next one had no room"
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == {f.name for f in files}
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    else:
        assert files[0].name == "model.safetensors"


def test_one_file_has_no_shards(tmp_path: Path) -> None:
    like = Checkpoint.from_tensors({"a": torch.ones(3)})
    with pytest.raises(MergeidError, match="--shard-size splits a folder"):
        CheckpointWriter(Output(tmp_path / "o.safetensors", shard_size=10), like=like)
