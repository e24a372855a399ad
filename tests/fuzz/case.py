"""What a campaign makes: a folder of files, a command line, and what would be right."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FAULT_FREE = frozenset({0, 1, 2})
"""Exit codes that any input may have: done, the answer is no, refused."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        words: the command line, without the program's name; relative paths are in the case's folder.
        outputs: what may be there afterwards that was not before, where the exit code is 0: files and folders.
        codes: right exit codes.
        check: of a run with exit code 0: what is wrong with its result, or None. Gets the folder.
        replaced: files and folders that were there and may be others afterwards (``--force``).
        env: further environment.
    """

    words: list[str]
    outputs: tuple[str, ...] = ()
    codes: frozenset[int] = FAULT_FREE
    check: Callable[[Path], str | None] | None = None
    replaced: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


Make = Callable[[random.Random, Path], Case]
"""Fills the (empty) folder and says what to run there."""


@dataclass(frozen=True)
class Campaign:
    """Attributes:
    name, make: see above.
    share: of all inputs, relative to the other campaigns.
    processes: one in so many inputs runs in a process of its own rather than in the long-lived one.
    env: environment of all of its inputs.
    """

    name: str
    make: Make
    share: float
    processes: int
    env: dict[str, str] = field(default_factory=dict)


CAMPAIGNS: dict[str, Campaign] = {}


def campaign(
    name: str, *, share: float, processes: int = 50, env: dict[str, str] | None = None
) -> Callable[[Make], Make]:
    """Register a generator."""

    def add(make: Make) -> Make:
        if name in CAMPAIGNS:
            raise ValueError(f"there are two campaigns called {name!r}")
        CAMPAIGNS[name] = Campaign(name, make, share, processes, env or {})
        return make

    return add


def rng_of(name: str, seed: int, index: int) -> random.Random:
    """Randomness of one input."""
    return random.Random(f"{name}:{seed}:{index}")
