"""Signals at random moments of real work: the output is whole or absent, and only SIGKILL leaves anything behind."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from .campaigns import models
from .files import pair, safetensors
from .lane import LIMIT, Lane

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {143, -15}, signal.SIGHUP: {129, -1}, signal.SIGINT: {130, -2}}
"""What a shell shows as 137, 143, 129 and 130: by exit, or by the signal itself where there was no handler yet."""
LARGE = 24 << 20
"""Bytes of one of the models of the plain merges."""


@dataclass(frozen=True)
class Work:
    """Something that takes long enough to be hit. Attributes:
    name, words: the command. outputs: what it writes, by name; the first cannot be there without the others.
    """

    name: str
    words: list[str]
    outputs: tuple[str, ...]
    share: int


WORKS = (
    Work("merge to a file", ["merge", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--match", "never"],
    ("o.safetensors", "mergeid.json"), 6),
    Work("merge to a folder", ["merge", "fa", "fb", "-o", "o", "--match", "never"], ("o",), 6),
    Work("replace a folder", ["merge", "fa", "fb", "-o", "o", "--match", "never", "--force"], ("o",), 3),
    Work("ties", ["merge", "a.safetensors", "b.safetensors", "--base", "b.safetensors", "--method", "ties", "-o", "o",
    "--match", "never"], ("o",), 1),
    Work("matched merge", ["merge", "a", "b", "--data", "d.npz", "-o", "o", "--force"], ("o",), 1),
    Work("graph", ["graph", "a", "--json", "o.json"], ("o.json",), 1),
    Work("sketch", ["sketch", "a", "--data", "d.npz", "-o", "o.sketch"], ("o.sketch",), 1),
)  # fmt: skip


@dataclass
class Killed:
    """What came of it."""

    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    how: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    failing: list[str] = field(default_factory=list)

    def table(self) -> str:
        states = ("nothing written", "whole", "ended before")
        rows = [
            [
                name,
                str(self.sent[name]),
                *(str(self.how[name, s]) for s in states),
                str(self.how[name, "temporary files"]),
                str(self.how[name, "failing"]),
            ]
            for name in (*(s.name for s in SIGNALS), *(w.name for w in WORKS))
        ]
        head = ["signal, or work", "sent", *states, "hidden files left", "failures"]
        return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def kills(count: int, seed: int, place: Path, jobs: int = 1) -> Killed:
    """`count` signals, `jobs` at a time; those sent earlier included. What fails is told on stderr."""
    kept = place / f"kills-{seed}.json"
    done: dict[str, list[Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    inputs = _inputs(place / "kill-inputs")
    order = [w for w in WORKS for _ in range(w.share)]
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(count):
        if str(number) not in done:
            waiting.put(number)
    wholes: dict[str, tuple[dict[str, str], float]] = {}
    lock = threading.Lock()

    def work(home: Path) -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        lane = Lane(home, {})
        while True:
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            rng = random.Random(f"kills:{seed}:{number}")
            work, sent = order[number % len(order)], SIGNALS[number // len(order) % len(SIGNALS)]
            if work.name not in wholes:
                wholes[work.name] = _whole(work, inputs, home, lane)
            wrong, states = _hit(work, sent, rng, inputs, home / "case", lane, *wholes[work.name])
            with lock:
                done[str(number)] = [work.name, sent.name, wrong, states]
                kept.write_text(json.dumps(done))
            if wrong:
                print(f"kills:{number} {work.name} {sent.name}: {wrong}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(place / "homes" / f"kills-{seed}-{k}",)) for k in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Killed()
    for number in range(count):
        name, signal_name, wrong, states = done[str(number)]
        for subject in (signal_name, name):
            found.sent[subject] += 1
            found.how.update((subject, state) for state in (*states, *(["failing"] if wrong else [])))
        if wrong:
            found.failing.append(f"{number} {name} {signal_name}: {wrong}")
    return found


def _inputs(folder: Path) -> Path:
    """Two large models as files and as folders of shards, and the small ones that run."""
    if folder.exists():
        return folder
    partial = folder.with_name("kill-inputs.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    models.put(partial, "a", "b", "d.npz")
    names = [f"layers.{i}.weight" for i in range(12)]
    rows = LARGE // 4 // 1024 // len(names)
    for name, table in zip("ab", pair(random.Random(7), names, [[rows, 1024]] * len(names)), strict=True):
        (partial / f"{name}.safetensors").write_bytes(safetensors(table, {"format": "pt"}))
        shards = {f"model-0000{k + 1}-of-00003.safetensors": names[k::3] for k in range(3)}
        (partial / f"f{name}").mkdir()
        for file, held in shards.items():
            (partial / f"f{name}" / file).write_bytes(safetensors({n: table[n] for n in held}, {"format": "pt"}))
        index = {"metadata": {}, "weight_map": {n: f for f, held in shards.items() for n in held}}
        (partial / f"f{name}" / "model.safetensors.index.json").write_text(json.dumps(index))
        (partial / f"f{name}" / "config.json").write_text("{}")
    partial.rename(folder)
    return folder


def _lay(work: Work, inputs: Path, case: Path) -> None:
    """A fresh folder with the inputs (as links: whether inputs change is what the other campaigns look at)."""
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for source in inputs.iterdir():
        (case / source.name).symlink_to(source)
    if "--force" in work.words:
        (case / "o").mkdir()
        (case / "o" / "model.safetensors").write_bytes(b"earlier")


def _state(work: Work, case: Path) -> dict[str, str]:
    """Hash of every file of the outputs; of the record, whose times differ, whether it is whole."""
    found = {}
    for name in work.outputs:
        path = case / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
        for file in files:
            if file.name == "mergeid.json":
                found[str(file.relative_to(case))] = "whole" if json.loads(file.read_text()).get("inputs") else "torn"
            else:
                found[str(file.relative_to(case))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _start(work: Work, case: Path, lane: Lane, err: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mergeid", *work.words]
    return subprocess.Popen(
        command,
        cwd=case,
        env=lane.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=err,
        start_new_session=True,
        preexec_fn=_hears,
    )


def _hears() -> None:
    """Signals that this process was told to ignore (nohup) would stay ignored."""
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


def _whole(work: Work, inputs: Path, home: Path, lane: Lane) -> tuple[dict[str, str], float]:
    """The outputs of a run that nothing disturbs, and its seconds (of a second run, since the first loads code)."""
    seconds = 0.0
    for _ in range(2):
        _lay(work, inputs, home / "case")
        with open(home / "err", "wb") as err:
            began = time.monotonic()
            code = _start(work, home / "case", lane, err).wait()
            seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"{work.name} does not work: {(home / 'err').read_text()[-500:]}")
    return _state(work, home / "case"), seconds


def _hit(
    work: Work,
    sent: signal.Signals,
    rng: random.Random,
    inputs: Path,
    case: Path,
    lane: Lane,
    whole: dict[str, str],
    seconds: float,
) -> tuple[str | None, list[str]]:
    """What is wrong, if anything, and what was found."""
    _lay(work, inputs, case)
    before = {p.name for p in case.iterdir()}
    earlier = _state(work, case)
    with open(case.with_name("err"), "wb") as err:
        process = _start(work, case, lane, err)
        if rng.random() < 0.4:
            _while_writing(process, case, before, rng)
        else:
            time.sleep(rng.uniform(0, 1.1 * seconds))
        ended = process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sent)
        try:
            code = process.wait(3 * LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"does not end within {3 * LIMIT:.0f} s", []
    said = case.with_name("err").read_text(errors="replace")
    found = _state(work, case)
    new = sorted({p.name for p in case.iterdir()} - before - set(work.outputs))
    left = sorted(p.name for p in lane.temporary.iterdir())
    for name in left:
        path = lane.temporary / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    killed = sent == signal.SIGKILL
    states = ["ended before" if ended else "whole" if found == whole else "nothing written"]
    states += ["temporary files"] if new or left else []
    if code not in (CODES[sent] | {0}):
        return f"exit code {code}: {said[-200:]!r}", states
    if "Traceback" in said and not _starting(said):
        return f"a traceback: {said[-200:]!r}", states
    if (new or left) and not (killed and all(n.startswith(".") for n in new)):
        return f"left behind: {[*new, *left][:3]}", states
    if code == 0 and found != whole:
        return f"exit code 0 with {sorted(found)} instead of {sorted(whole)}", states
    alone = killed and set(found) == {"mergeid.json"}
    if found not in (whole, earlier) and not alone and not (killed and not found and "--force" in work.words):
        return f"neither whole nor nothing: {sorted(found)}", states
    return None, states


def _starting(said: str) -> bool:
    """Whether Python itself was interrupted while it started, before any line of mergeid was read."""
    return "mergeid" not in said.replace("-m mergeid", "")


def _while_writing(process: subprocess.Popen[bytes], case: Path, before: set[str], rng: random.Random) -> None:
    """Wait until something new is in the folder, and then a moment."""
    while process.poll() is None and not {p.name for p in case.iterdir()} - before:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
