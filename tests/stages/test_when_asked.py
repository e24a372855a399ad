"""Large values that are made when they are asked for: once, whoever asks, and no others."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mergeid.basics import when_asked
from mergeid.basics.when_asked import Stored, WhenAsked

NAMES = [f"s{i}" for i in range(12)]


def array(name: str) -> np.ndarray:
    return np.random.default_rng(NAMES.index(name)).standard_normal((40, 40))


def test_threads_that_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(when_asked, "SMALL", 0)
    made: Counter[str] = Counter()
    together = threading.Barrier(8)

    def make(name: str) -> np.ndarray:
        made[name] += 1
        return array(name)

    stored = Stored(NAMES, make)

    def ask(k: int) -> list[np.ndarray]:
        together.wait()
        return [np.asarray(stored[name]) for name in NAMES[k:] + NAMES[:k]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for k, arrays in enumerate(found):
        assert all(np.array_equal(x, array(n)) for x, n in zip(arrays, NAMES[k:] + NAMES[:k], strict=True))
    assert made == Counter(NAMES)


@pytest.mark.parametrize("kind", ["stored", "when asked"])
def test_what_is_not_there_is_not_made(kind: str) -> None:
    made: list[str] = []
    make = made.append
    found = Stored(NAMES, make) if kind == "stored" else WhenAsked(NAMES, make, lambda _: 0)  # type: ignore[arg-type]
    assert found.get("other") is None and "other" not in found and not made
    with pytest.raises(KeyError):
        found["other"]
    assert list(found) == NAMES and len(found) == len(NAMES)
