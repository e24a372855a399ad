"""SIGKILL at any moment leaves either no output or the whole one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HELPER = """
# Imports once, then forks: every child merges and is killed. Prints what was left under the final name.
import hashlib, json, os, pathlib, random, shutil, signal, sys, time
import torch, numpy
sys.path.insert(0, sys.argv[-1])
from merging import merge_checkpoints

a, b, place, mode, rounds = sys.argv[1:6]
place = pathlib.Path(place)

def merge(output):
    merge_checkpoints(a, b, output, weights=(0.3, 0.7), record={"complete": True})

def child(output, kill_at=None, after=False):
    pid = os.fork()
    if pid:
        return pid
    if kill_at is not None:
        calls = [0]
        def wrapped(real):
            def call(*args):
                calls[0] += 1
                if calls[0] == kill_at and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args)
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call
        for step in ("replace", "rename", "fsync", "mkdir"):
            setattr(os, step, wrapped(getattr(os, step)))
    merge(output)
    os._exit(0)

def look(output, status):
    files = sorted(p for p in output.rglob("*") if p.is_file()) if output.is_dir() else [output] * output.exists()
    found = {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in files if p.name != "mergeid.json"}
    record = (output if output.is_dir() else place) / "mergeid.json"
    answer = {"killed": os.WIFSIGNALED(status), "found": found,
              "record": record.exists() and json.loads(record.read_text())["complete"],
              "others": [p.name for p in place.iterdir() if p not in (output, record)]}
    for p in place.iterdir():
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    print(json.dumps(answer), flush=True)

for suffix in ("o.safetensors", "o"):
    output = place / suffix
    start = time.monotonic()
    look(output, os.waitpid(child(output), 0)[1])
    whole = time.monotonic() - start
    generator = random.Random(int(rounds))
    for k in range(int(rounds)):
        if mode == "random":
            pid = child(output)
            time.sleep(generator.uniform(0, 1.1 * whole))
            os.kill(pid, signal.SIGKILL)
        else:
            pid = child(output, kill_at=k // 2 + 1, after=k % 2 == 1)
        look(output, os.waitpid(pid, 0)[1])
"""


def attempts(tmp_path: Path, mode: str, rounds: int, tensors: int, rows: int) -> list[list[dict]]:
    """For a file and for a folder output: what was left by a whole run, then by every killed one."""
    shape = (rows, 1024)
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        numbers = {f"layer{i}.weight": torch.randn(shape, generator=generator) for i in range(tensors)}
        save_file(numbers, tmp_path / f"{name}.safetensors")
    place = tmp_path / "place"
    place.mkdir()
    script = tmp_path / "helper.py"
    script.write_text(HELPER)
    command = [sys.executable, str(script), *(str(tmp_path / f"{n}.safetensors") for n in "ab"), str(place)]
    done = subprocess.run(
        [*command, mode, str(rounds), str(Path(__file__).parents[1] / "helpers")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [answers[: rounds + 1], answers[rounds + 1 :]]


def check(answers: list[dict]) -> None:
    whole, *killed = answers
    assert whole["found"] and whole["record"] and not whole["killed"] and not whole["others"]
    for answer in killed:
        assert answer["found"] in ({}, whole["found"])
        if answer["found"]:
            assert answer["record"], "the whole output includes its record"
        assert all(name.startswith(".") for name in answer["others"]), "only hidden files may be left"


def test_killed_at_every_step_of_publishing(tmp_path: Path) -> None:
    """Before and after each call that moves or secures a file: deterministic, so no window is missed."""
    for answers in attempts(tmp_path, "steps", 40, tensors=2, rows=4):
        check(answers)
        assert sum(a["killed"] for a in answers) >= 8
        assert any(a["killed"] and not a["found"] for a in answers)
        assert any(a["killed"] and a["found"] for a in answers)


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    """Two models of 150 MB, written as a file and as a folder, each killed ten times."""
    both = attempts(tmp_path, "random", 10, tensors=24, rows=1536)
    for answers in both:
        check(answers)
    assert sum(a["killed"] and bool(a["others"]) for answers in both for a in answers) >= 5, "killed while writing"
    assert hashlib.sha256(b"").hexdigest() not in both[0][0]["found"].values()


RESUMED = """
# As above, but what a killed merge did is gone on with; every tensor is secured, so that some are done already.
import hashlib, json, os, pathlib, random, signal, sys, time
import torch, numpy
sys.path.insert(0, sys.argv[-1])
from merging import merge_checkpoints
from mergeid.io import stream

a, b, place, rounds = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
stream.COMMIT = 1 << 20

def merge(output, resume):
    pid = os.fork()
    if pid:
        return pid
    merge_checkpoints(a, b, output, method="ties", base=sys.argv[5], resume=resume)
    os._exit(0)

def digest(output):
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()
                                   and p.name != "mergeid.json")).hexdigest()

begun = time.monotonic()
os.waitpid(merge(place / "whole", False), 0)
whole = time.monotonic() - begun
print(json.dumps(digest(place / "whole")), flush=True)
generator = random.Random(rounds)
for k in range(rounds):
    output, kills, kept = place / f"round{k}" / "out", 0, []
    output.parent.mkdir()
    for wait in [generator.uniform(0.05, 1.0) * whole, *[generator.uniform(0.3, 1.2) * whole] * (k % 3)]:
        pid = merge(output, kills > 0)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if output.exists():
            break
        kept.append(max([len(p.read_bytes().splitlines()) for p in output.parent.glob(".*/journal.jsonl")] or [0]))
    ended = not output.exists()  # else it was killed after it had published its output
    if ended:
        os.waitpid(merge(output, True), 0)
    left = len(list(output.parent.glob(".*"))) if ended else 0
    print(json.dumps({"digest": digest(output), "kills": kills, "kept": kept, "left": left}), flush=True)
"""


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed(tmp_path: Path) -> None:
    """The same bytes as of an undisturbed run, whenever and however often it was killed; nothing is left behind."""
    for seed, name in enumerate(("a", "b", "base")):
        generator = torch.Generator().manual_seed(seed)
        numbers = {f"layer{i}.weight": torch.randn(256, 1024, generator=generator) for i in range(24)}
        save_file(numbers, tmp_path / f"{name}.safetensors")
    place = tmp_path / "place"
    place.mkdir()
    script = tmp_path / "helper.py"
    script.write_text(RESUMED)
    files = [str(tmp_path / f"{n}.safetensors") for n in ("a", "b")]
    command = [sys.executable, str(script), *files, str(place), "10", str(tmp_path / "base.safetensors")]
    done = subprocess.run(
        [*command, str(Path(__file__).parents[1] / "helpers")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, *found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 10 and all(f["digest"] == whole for f in found)
    assert sum(f["kills"] for f in found) >= 8
    assert sum(any(n > 2 for n in f["kept"]) for f in found) >= 5, "some tensors were done when it was killed"
    assert not any(f["left"] for f in found)
