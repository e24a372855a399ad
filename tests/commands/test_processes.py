"""plan, merge and barrier from one, two and three processes of `accelerate launch`: the same numbers, and one voice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launched
from safetensors.torch import load_file
from shared_worker import EXAMPLES, results, write_pair

from mergeid.basics import processes
from mergeid.errors import MergeidError

HELPERS = Path(__file__).parents[1] / "helpers"
WORKER = HELPERS / "shared_worker.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="module")
def here(pair: Path) -> dict[str, Any]:
    """From this process alone."""
    found: dict[str, Any] = json.loads(json.dumps(results(pair, pair / "merged")))
    assert found["plan"]["verdict"] == "match" and found["solved"] is not None
    assert found["plan"]["examples"] == found["barrier"]["count"] == EXAMPLES
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_processes_does_not_show(count: int, pair: Path, here: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    done = launched(count, [str(WORKER), str(pair), str(output), str(count)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(output.with_suffix(".json").read_text()) == here
    for name in ("", "-solved"):
        ours, theirs = (load_file(Path(f"{f}{name}") / "model.safetensors") for f in (pair / "merged", output))
        assert all(torch.equal(theirs[k], v) for k, v in ours.items()) and ours.keys() == theirs.keys()


@pytest.mark.slow
def test_one_process_alone_writes_and_prints(pair: Path, tmp_path: Path) -> None:
    a, b, output = str(pair / "a"), str(pair / "b"), tmp_path / "merged"
    done = launched(2, ["-m", "mergeid", "merge", a, b, "--match", "always", "-o", str(output), "--json"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["verdict"] == "match"  # one document
    again = launched(2, ["-m", "mergeid", "merge", a, b, "--match", "always", "-o", str(output)])
    assert again.returncode and again.stderr.count("mergeid: error:") == 1 and "exists" in again.stderr
    other = launched(2, ["-m", "mergeid", "graph", a, "--json"])  # nothing of it is shared out
    assert other.returncode == 0 and json.loads(other.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "which", "said"),
    [
        ("refuses", 0, "error: the disk of this process is full"),
        ("refuses", 1, "error: the disk of this process is full"),
        ("errs", 1, "error: internal error"),
        ("dies", 1, "error: another process has ended"),
    ],
)
def test_a_process_that_fails_ends_all(how: str, which: int, said: str, pair: Path) -> None:
    """In time, with one sentence and the exit code that belongs to it."""
    words = ["plan", str(pair / "a"), str(pair / "b"), "--data", str(pair / "data.npz"), "--limit", "64"]
    done = launched(2, [str(HELPERS / "failing_worker.py"), how, str(which), *words], timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mergeid: error:")]
    assert done.returncode and not done.stdout
    if how != "dies" or lines:  # the launcher may end the other one before it has seen that it is alone
        assert len(lines) == 1 and said in lines[0], done.stderr[-3000:]
    code = {"refuses": 2, "errs": 3, "dies": 9}[how]
    assert re.search(rf"exitcode\s*: {code}\b", done.stderr), done.stderr[-3000:]


def test_one_process_does_all() -> None:
    assert processes.place() == (0, 1) and processes.launched() == 1 and processes.is_first()
    assert processes.shared(range(4), lambda k: k * k) == list(processes.in_turn(range(4), lambda k: k * k))
    assert processes.everyones("x") == ["x"] and processes.collected({0: 5, 1: 6}, [0, 0]) == [5, 6]
    with pytest.raises(MergeidError, match="no"):
        processes.shared([1], lambda _: (_ for _ in ()).throw(MergeidError("no")))


def test_work_is_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "place", lambda: (1, 2))
    assert processes.dealt([9.0, 5.0, 4.0, 1.0]) == [0, 1, 1, 0]
    assert processes.dealt([]) == []


def test_the_launcher_tells_who_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert processes.launched() == 1 and processes.is_first()  # left by another program: no launcher
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert processes.launched() == 3 and not processes.is_first() and not processes.speaks()
