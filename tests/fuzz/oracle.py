"""What an input may do to a user: an exit code, one sentence, no trace where it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from .case import Case
from .files import read

LONGEST = 620
"""Characters of a message, its line's beginning included."""
PROGRESS = re.compile(r"^mergeid: [\w .()-]+( \([\d hmins]+ left\))?(: \d+ %)?$")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Ran:
    """How a command went.

    Attributes:
        code: exit code; negative: the signal that ended it; None: it did not end in time.
        out, err: both streams, bytes that are no UTF-8 as surrogates.
        seconds: wall time, less what the process waited for a busy processor.
        left: files in the folder for temporary files afterwards.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    left: tuple[str, ...] = ()


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder: kind and content of everything, by path."""
    found: dict[str, str] = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            there = os.lstat(path)
            if stat.S_ISLNK(there.st_mode):
                what = f"link to {os.readlink(path)!r}"
            elif stat.S_ISREG(there.st_mode):
                what = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            else:
                what = str(stat.S_IFMT(there.st_mode))
            found[os.path.relpath(path, folder)] = f"{stat.S_IMODE(there.st_mode):o} {what}"
    return found


def faults(case: Case, ran: Ran, before: dict[str, str], after: dict[str, str], folder: Path) -> list[str]:
    """What is wrong; nothing: an empty list. Each begins with its kind."""
    if ran.code is None:
        return [f"hang: no end in {ran.seconds:.0f} s"]
    found: list[str] = []
    if "Traceback (most recent call last)" in ran.err or "Traceback (most recent call last)" in ran.out:
        found.append(f"traceback: {(ran.err.strip().splitlines() or ['?'])[-1][:200]}")
    if ran.code not in case.codes:
        found.append(f"exit code: {ran.code}, expected {' or '.join(map(str, sorted(case.codes)))}")
    found += _messages(ran)
    found += _files(case, ran.code, before, after, folder)
    if ran.left:
        found.append(f"left behind: {', '.join(ran.left[:3])} among the temporary files")
    if ran.code == 0 and not found and case.check is not None and (wrong := case.check(folder)):
        found.append(f"wrong result: {wrong}")
    return found


def _messages(ran: Ran) -> list[str]:
    found = []
    lines = [line for line in ran.err.split("\n") if line.strip() and not PROGRESS.match(line)]
    own = [line for line in lines if line.startswith("mergeid: ")]
    said = [line for line in lines if not line.startswith("mergeid: warning: ")]
    if ran.code == 2 and (len(said) != 1 or not said[0].startswith("mergeid: error: ")):
        found.append(f"message: {len(said)} lines instead of one sentence: {said[:2]!r}"[:300])
    if ran.code == 2 and ran.out.strip():
        found.append(f"message: stdout has {ran.out[:80]!r} beside an error")
    if ran.code == 1 and len(said) > 1:
        found.append(f"message: {len(said)} lines: {said[:2]!r}"[:300])
    for line in own:
        if len(line) > LONGEST:
            found.append(f"message: {len(line)} characters: {line[:100]!r}")
    for stream, text in (("stderr", ran.err), ("stdout", ran.out)):
        if match := CONTROL.search(text):
            at = match.start()
            found.append(f"message: control character on {stream}: {text[max(0, at - 30) : at + 10]!r}")
    return found


def _files(case: Case, code: int, before: dict[str, str], after: dict[str, str], folder: Path) -> list[str]:
    def under(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == r or name.startswith(r + "/") for r in roots)

    found = []
    free = case.replaced if code == 0 else ()
    changed = [n for n in before if after.get(n) != before[n] and not under(n, free)]
    if changed:
        gone = "is gone" if changed[0] not in after else "is another"
        found.append(f"input changed: {changed[0]!r} {gone}")
    allowed = (*case.outputs, *case.replaced) if code == 0 else ()
    new = [n for n in after if n not in before and not under(n, allowed)]
    if new:
        found.append(f"left behind: {new[:3]!r} with exit code {code}")
    if code == 0:
        for name in after:
            if name not in before and (wrong := _torn(folder / name)):
                found.append(f"output not whole: {name!r}: {wrong}")
    return found


def _torn(path: Path) -> str | None:
    """What is wrong with a file of ours."""
    try:
        if path.name.endswith((".safetensors", ".sketch")) and path.is_file():
            read(path)
        elif path.name.endswith(("mergeid.json", "o.json")) and path.is_file():  # other tables are copies of A's
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        return str(error)[:100]
    return None
