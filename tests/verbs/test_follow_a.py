"""The argument `a` of `merge`, followed from call to call until it has become a `TensorSource`: the modules it enters.

A call is on the way if it is made by one that is, and one of its arguments is `a`: the object or the path itself, a
list of models or the request that holds it. What has become a source (`mergeid.io.tensors.TensorSource`) is a value of
its own, which stages take, and so is the network that runs (`mergeid.models.loaded.Loaded`), and a file in a folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mergeid
from mergeid.io.checkpoint import Checkpoint
from mergeid.models.loaded import Loaded

ROOT = f"{Path(mergeid.__file__).parent}{os.sep}"
VERB = "verbs/merge.py"
WAY = {
    "file": {"io/header.py", "basics/reading.py", "io/output.py"},
    "pickle": {"io/pickled.py", "basics/reading.py", "io/checkpoint.py", "io/output.py"},
    "folder": {"io/folders.py", "io/output.py"},
    "adapter": {"io/output.py"},
    "hub": {"io/hub.py", "io/output.py"},
    "module": set[str](),
}
"""By what `a` is, the modules that it enters besides those that every model goes through."""
ALWAYS = {
    "request/boundary.py",
    VERB,
    "stages/merge_request.py",
    "stages/open.py",
    "models/workbench.py",
    "io/opening.py",
}
BECOMES = {"io/checkpoint.py", "io/derived.py"}
"""Where the classes of what it becomes lie."""


class Trail:
    """A profiler: the modules whose functions take `a`, and who calls functions of the verb's module."""

    def __init__(self, a: object) -> None:
        self.a = a
        self.path = os.path.realpath(a) if isinstance(a, (str, os.PathLike)) else None
        self.modules: set[str] = set()
        self.back: set[str] = set()
        self._on: set[FrameType] = set()

    def holds(self, value: object) -> bool:
        if value is self.a:
            return True
        if isinstance(value, (str, os.PathLike)):
            return self.path is not None and bool(os.fspath(value)) and os.path.realpath(value) == self.path
        if isinstance(value, (list, tuple)):
            return any(map(self.holds, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, (Checkpoint, Loaded)):
            return any(self.holds(getattr(value, f.name, None)) for f in dataclasses.fields(value))
        return False

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT):
            return
        module, before = code.co_filename.removeprefix(ROOT), frame.f_back
        while before is not None and not before.f_code.co_filename.startswith(ROOT):
            before = before.f_back
        if module == VERB and before is not None:
            self.back.add(before.f_code.co_filename.removeprefix(ROOT))
        if before is not None and before not in self._on:
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        inner = code.co_name.startswith("<")  # a comprehension or a lambda: its caller's
        if inner or any(self.holds(frame.f_locals.get(name)) for name in code.co_varnames[:count]):
            self._on.add(frame)
            self.modules |= set() if inner else {module}


def followed(a: object, work: Callable[[], object]) -> Trail:
    found = Trail(a)
    before = sys.getprofile()
    sys.setprofile(found)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def folder(path: Path, seed: int) -> str:
    path.mkdir()
    save_file(network(seed).state_dict(), path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return str(path)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """One of every kind."""
    whole = folder(tmp_path / "folder", 0)
    save_file(network(0).state_dict(), tmp_path / "a.safetensors")
    torch.save(network(0).state_dict(), tmp_path / "a.pt")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    told = {"peft_type": "LORA", "lora_alpha": 1, "base_model_name_or_path": whole}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    factors = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"base_model.model.0.{name}.weight": value for name, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    monkeypatch.setattr("mergeid.io.hub._fetch", lambda repo, revision, allow_pickle: Path(whole))
    return {
        "file": str(tmp_path / "a.safetensors"),
        "pickle": tmp_path / "a.pt",
        "folder": whole,
        "adapter": str(adapter),
        "hub": "someone/model",
        "module": network(0),
    }


@pytest.mark.parametrize("kind", list(WAY))
def test_the_way_of_a(kind: str, models: dict[str, object], tmp_path: Path) -> None:
    a = models[kind]
    one: dict[str, object] = {} if kind == "module" else {"output": tmp_path / "merged"}
    b = network(1) if kind == "module" else folder(tmp_path / "b", 1)
    if kind in ("file", "pickle"):
        one["output"] = tmp_path / "merged.safetensors"
    merge: Callable[..., object] = mergeid.merge
    found = followed(a, lambda: merge(a, b, match="never", allow_pickle=True, **one))
    assert found.modules == ALWAYS | WAY[kind]
    assert found.back <= {"request/boundary.py", VERB}


def test_the_way_of_a_module_whose_neurons_are_matched() -> None:
    a, b = network(0), network(1)
    data = [{"arg0": row} for row in torch.randn(64, 4)]
    merge: Callable[..., object] = mergeid.merge
    found = followed(a, lambda: merge([a, b], data=data, example_inputs=torch.randn(2, 4), force=True))
    assert found.modules == ALWAYS
    assert found.back <= {"request/boundary.py", VERB}


def test_in_all_it_enters_at_most_fourteen_modules() -> None:
    assert len(ALWAYS.union(*WAY.values(), BECOMES)) <= 14
