"""The example of a third-party adapter: installed with pip, it is found and used by every verb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Done, mergeid
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_adapter"
pytestmark = pytest.mark.slow
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the example is installed into."""
    folder = tmp_path_factory.mktemp("custom")
    shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files beside its sources
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", folder / "installed"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words), str(folder / "source")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "installed"


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """The command in a process that sees the installed example; a.safetensors and b.safetensors lie there."""
    path = os.pathsep.join([str(place), *(p for p in sys.path if p)])
    code = "from keyword_nets.network import save; save('a.safetensors', seed=0); save('b.safetensors', seed=1)"
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    return lambda *words: mergeid(*words, cwd=tmp_path, PYTHONPATH=path)


def test_nothing_is_known_without_it(tmp_path: Path) -> None:
    done = mergeid("adapters", "keyword-nets/*", cwd=tmp_path)
    assert done.code == 1


def test_adapters_lists_it(run: Run) -> None:
    done = run("adapters", "--json")
    assert done.code == 0, done.stderr
    row = {"adapter": "keyword-nets", "package": "keyword_nets", "version": "1.0", "architectures": 2}
    assert row in json.loads(done.stdout)


def test_graph(run: Run) -> None:
    for model in ("a.safetensors", "keyword-nets/small"):
        done = run("graph", model, "--json")
        assert done.code == 0, done.stderr
        graph = json.loads(done.stdout)
        assert graph["model"] == "keyword-nets/small"
        labels = {s["label"]: s["size"] for s in graph["spaces"]}
        assert labels == {"residual stream": 16, **{f"blocks.{i} gated neurons": 24 for i in range(3)}}
        assert graph["share"] > 0.99 and graph["verified"]["max_relative_error"] < 1e-9


def test_plan_and_merge(run: Run, tmp_path: Path) -> None:
    done = run("plan", "a.safetensors", "b.safetensors", "--json")
    assert done.code == 0, done.stderr
    assert len(json.loads(done.stdout)["spaces"]) == 4
    done = run("merge", "a.safetensors", "b.safetensors", "-o", "merged.safetensors", "--match", "always")
    assert done.code == 0, done.stderr
    a, merged = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "merged.safetensors")
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in merged.items()}


def test_scramble(run: Run, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("scramble", "a.safetensors", "-o", "same.safetensors", "--seed", 3)
    assert done.code == 0, done.stderr
    monkeypatch.syspath_prepend(str(place))
    from keyword_nets.network import KeywordNet  # type: ignore[import-not-found]

    x = torch.randn(4, 40, 30, generator=torch.Generator().manual_seed(0))
    outputs = []
    for name in ("a", "same"):
        model = KeywordNet().eval()
        model.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    before, after = (load_file(tmp_path / f"{name}.safetensors")["front.weight"] for name in ("a", "same"))
    assert not torch.equal(before, after)
