"""Runs campaigns, keeps what fails, and prints the table."""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from . import campaigns as _campaigns  # noqa: F401
from .campaigns import models
from .case import CAMPAIGNS, Campaign, rng_of
from .lane import Lane
from .oracle import Ran, faults, snapshot

KEPT = 200
"""Failing inputs of a campaign whose folders are kept."""
LOCK = threading.Lock()


@dataclass
class Ledger:
    """How far a campaign is: kept on disk, so that it goes on where it stopped."""

    name: str
    seed: int
    next: int = 0
    processes: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    failing: dict[str, list[str]] = field(default_factory=dict)
    mended: int = 0
    waiting: list[int] = field(default_factory=list)
    slowest: float = 0.0

    def count(
        self, index: int, code: int | None, found: list[str], before: str = "", kinds: Sequence[str] = ()
    ) -> None:
        """Of one input: its exit code and faults, instead of those that it had before."""
        now = sorted({f.partition(":")[0] for f in found})
        for table, gone, come in ((self.codes, [before] if before else [], [str(code)]), (self.faults, kinds, now)):
            for key in gone:
                table[key] -= 1
            for key in come:
                table[key] = table.get(key, 0) + 1
        if found:
            self.failing[str(index)] = [str(code), *now]

    @classmethod
    def of(cls, place: Path, name: str, seed: int) -> Ledger:
        path = place / f"{name}-{seed}.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls(name, seed)

    def save(self, place: Path) -> None:
        path = place / f"{self.name}-{self.seed}.json"
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)


def one(campaign: Campaign, seed: int, index: int, lane: Lane, place: Path, *, alone: bool) -> tuple[list[str], Ran]:
    """Make, run and judge one input. What fails is kept in `place`/failures."""
    rng = rng_of(campaign.name, seed, index)
    with tempfile.TemporaryDirectory(prefix="case-", dir=place) as name:
        folder = Path(name)
        case = campaign.make(rng, folder)
        before = snapshot(folder)
        ran = lane.run(case, folder, alone=alone)
        found = faults(case, ran, before, snapshot(folder), folder)
        if found:
            kept = place / "failures" / f"{campaign.name}-{seed}-{index}"
            shutil.rmtree(kept, ignore_errors=True)
            if sum(1 for p in kept.parent.glob(f"{campaign.name}-*")) < KEPT:
                kept.mkdir(parents=True, exist_ok=True)
                told = {"words": case.words, "alone": alone, "faults": found, "code": ran.code}
                (kept / "case.json").write_text(
                    json.dumps({**told, "stdout": ran.out[-2000:], "stderr": ran.err[-6000:]}, indent=1)
                )
    return found, ran


def again(campaign: Campaign, seed: int, lane: Lane, place: Path) -> Ledger:
    """The inputs that failed, once more after a mend: each is counted as what it is now."""
    ledger = Ledger.of(place, campaign.name, seed)
    for index in list(ledger.failing):
        found, ran = one(campaign, seed, int(index), lane, place, alone=int(index) % campaign.processes == 0)
        code, *kinds = ledger.failing.pop(index)
        ledger.count(int(index), ran.code, found, code, kinds)
        ledger.mended += not found
        ledger.save(place)
    return ledger


def several(campaign: Campaign, seed: int, count: int, lane: Lane, place: Path) -> Ledger:
    """`count` inputs of a campaign, those done earlier included; those with a process of their own are kept waiting."""
    ledger = Ledger.of(place, campaign.name, seed)
    while ledger.next < count:
        index = ledger.next
        if index % campaign.processes == 0:
            ledger.waiting.append(index)
        else:
            judge(campaign, ledger, index, lane, place, alone=False)
        ledger.next += 1
        if index % 50 == 49:
            ledger.save(place)
    ledger.save(place)
    return ledger


def judge(campaign: Campaign, ledger: Ledger, index: int, lane: Lane, place: Path, *, alone: bool) -> None:
    """One input more in the ledger."""
    found, ran = one(campaign, ledger.seed, index, lane, place, alone=alone)
    with LOCK:
        ledger.processes += alone
        if alone:
            ledger.waiting.remove(index)
        ledger.slowest = max(ledger.slowest, ran.seconds)
        ledger.count(index, ran.code, found)
        if found:
            print(f"{campaign.name}:{index}: {'; '.join(found)[:300]!r}", file=sys.stderr, flush=True)
        if found or alone:
            ledger.save(place)


def alone(ledgers: list[Ledger], place: Path, jobs: int) -> None:
    """The inputs that wait for a process of their own, `jobs` at a time."""
    waiting: SimpleQueue[tuple[Ledger, int]] = SimpleQueue()
    for ledger in ledgers:
        for index in list(ledger.waiting):
            waiting.put((ledger, index))

    def work(home: Path) -> None:
        while True:
            try:
                ledger, index = waiting.get_nowait()
            except Empty:
                return
            campaign = CAMPAIGNS[ledger.name]
            judge(campaign, ledger, index, Lane(home, campaign.env), place, alone=True)

    threaded(work, [place / "homes" / f"alone-{k}" for k in range(jobs)])


def threaded(work: Callable[[Path], None], homes: list[Path]) -> None:
    """One thread for each home, until all are done."""
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
    threads = [threading.Thread(target=work, args=(home,)) for home in homes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shares(count: int, names: list[str]) -> dict[str, int]:
    """How many inputs each campaign gets; at least one."""
    total = sum(CAMPAIGNS[n].share for n in names)
    return {n: max(1, round(count * CAMPAIGNS[n].share / total)) for n in names}


FAULTS = (
    "traceback",
    "exit code",
    "hang",
    "left behind",
    "input changed",
    "message",
    "output not whole",
    "wrong result",
)


def table(ledgers: list[Ledger]) -> str:
    """Markdown: campaign, inputs, exit codes, failures by kind."""
    codes = sorted({c for x in ledgers for c, n in x.codes.items() if n}, key=lambda c: (c == "None", c))
    head = [
        "campaign",
        "inputs",
        "own process",
        *(f"exit {c}" if c != "None" else "no end" for c in codes),
        *FAULTS,
        "slowest",
    ]
    rows = [
        [x.name, f"{x.next - len(x.waiting):,}", f"{x.processes:,}", *(f"{x.codes.get(c, 0):,}" for c in codes)]
        + [f"{x.faults.get(f, 0):,}" for f in FAULTS]
        + [f"{x.slowest:.1f} s"]
        for x in ledgers
    ]
    whole = Ledger("all", 0, sum(x.next - len(x.waiting) for x in ledgers), sum(x.processes for x in ledgers))
    sums: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for x in ledgers:
        sums.update(x.codes)
        kinds.update(x.faults)
    rows.append(
        ["**all**", f"{whole.next:,}", f"{whole.processes:,}", *(f"{sums[c]:,}" for c in codes)]
        + [f"{kinds[f]:,}" for f in FAULTS]
        + [f"{max((x.slowest for x in ledgers), default=0):.1f} s"]
    )
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def campaign_all(
    names: list[str], counts: dict[str, int], seed: int, place: Path, jobs: int, only_failing: bool = False
) -> list[Ledger]:
    """All campaigns, `jobs` at a time; or what failed in them."""
    place.mkdir(parents=True, exist_ok=True)
    waiting: SimpleQueue[str] = SimpleQueue()
    for name in sorted(names, key=lambda n: -counts[n] * (10 if n in ("data", "graphs", "hub") else 1)):
        waiting.put(name)
    done: dict[str, Ledger] = {}

    def work(home: Path) -> None:
        while True:
            try:
                name = waiting.get_nowait()
            except Empty:
                return
            campaign = CAMPAIGNS[name]
            lane = Lane(home / name, campaign.env)
            try:
                done[name] = (
                    again(campaign, seed, lane, place)
                    if only_failing
                    else several(campaign, seed, counts[name], lane, place)
                )
            finally:
                lane.close()

    threaded(work, [place / "homes" / f"lane-{k}" for k in range(jobs)])
    ledgers = [done[n] for n in names if n in done]
    alone(ledgers, place, jobs)
    return ledgers


def replay(which: str, seed: int, place: Path) -> int:
    """One input again, in a process of its own, with what it prints."""
    name, _, index = which.partition(":")
    campaign = CAMPAIGNS[name]
    home = place / "homes" / "replay"
    home.mkdir(parents=True, exist_ok=True)
    lane = Lane(home, campaign.env)
    found, ran = one(campaign, seed, int(index), lane, place, alone=True)
    rng = rng_of(name, seed, int(index))
    with tempfile.TemporaryDirectory(prefix="case-", dir=place) as folder:
        print("mergeid", *map(repr, campaign.make(rng, Path(folder)).words))
    print(ran.out, ran.err, f"exit code {ran.code}, {ran.seconds:.1f} s", *(found or ["nothing is wrong"]), sep="\n")
    return bool(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz", description=(sys.modules["fuzz"].__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=2000, help="inputs in all (for kills: signals, --signals)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[*CAMPAIGNS, "kills"], help="repeatable")
    parser.add_argument("--signals", type=int, help="kills: signals sent; by default count / 150, at least 8")
    parser.add_argument("--jobs", type=int, default=1, help="campaigns at a time")
    parser.add_argument(
        "--folder", type=Path, help="where progress and failing inputs are kept; going on there is possible"
    )
    parser.add_argument("--again", action="store_true", help="only what failed in --folder, after a mend")
    parser.add_argument("--replay", metavar="CAMPAIGN:NUMBER", help="one input again")
    parser.add_argument("--table", type=Path, help="also write the table there (Markdown)")
    given = parser.parse_args(arguments)
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    place = given.folder or Path(tempfile.mkdtemp(prefix="mergeid-fuzz-", dir=fast))
    place = place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MERGEID_FUZZ_MODELS", str(place / "models"))
    models.folder()  # once, before there are several threads
    if given.replay:
        return replay(given.replay, given.seed, place)
    names = [n for n in (given.only or [*CAMPAIGNS, "kills"])]
    began = time.monotonic()
    fuzzed = [n for n in names if n != "kills"]
    counts = shares(given.count, fuzzed) if fuzzed else {}
    ledgers = campaign_all(fuzzed, counts, given.seed, place, given.jobs, given.again)
    text = table(ledgers) if ledgers else ""
    failing = sum(len(x.failing) for x in ledgers)
    if "kills" in names:
        from .kills import kills

        killed = kills(given.signals or max(8, given.count // 150), given.seed, place, given.jobs)
        text += "\n\n" + killed.table()
        failing += len(killed.failing)
    print(text)
    print(f"\n{failing} failing inputs, {time.monotonic() - began:.0f} s; kept in {place}")
    if given.table:
        given.table.write_text(text + "\n", encoding="utf-8")
    return bool(failing)
