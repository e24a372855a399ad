"""Graphs in the exchange format, as somebody would write or correct them by hand."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from . import models


@functools.cache
def _graph() -> Any:
    return json.loads(models.content("g.json"))


@campaign("graphs", share=0.5, processes=100)
def graphs(rng: random.Random, folder: Path) -> Case:
    models.put(folder, "a")
    valid = rng.random() < 0.03
    graph = _graph() if valid else odd.damaged(rng, _graph()) if rng.random() < 0.4 else _meant(rng)
    (folder / "h.json").write_bytes(odd.written(rng, graph, 0.0 if valid else 0.07))
    words = ["graph", "a", "--from", "h.json"]
    outputs: tuple[str, ...] = ()
    if rng.random() < 0.3:
        words += rng.choice((["--json", "o.json"], ["-o", "o.json"], ["--why", "classifier.weight[1]"], ["--all"]))
        outputs = ("o.json",)
    return Case(words, outputs, codes=frozenset({0}) if valid else frozenset({0, 1, 2}))


def _meant(rng: random.Random) -> Any:
    """The parts that mean something, changed one at a time."""
    graph = json.loads(json.dumps(_graph()))
    space = rng.choice(graph["spaces"])
    axis = rng.choice(space["axes"]) if space["axes"] else {}
    how = rng.randrange(9)
    if how == 0:
        space["size"] = rng.choice((0, 1, space["size"] + 1, *odd.NUMBERS))
    elif how == 1:
        space["blocks"] = rng.choice((0, 3, space["size"], *odd.NUMBERS))
    elif how == 2:
        space["parents"] = rng.choice(([space["id"]], ["s99"], [s["id"] for s in graph["spaces"]], odd.value(rng)))
    elif how == 3:
        axis["index"] = rng.choice(
            ([], axis.get("index", [])[:-1], [[0, 0]] * len(axis.get("index", [])), odd.value(rng))
        )
    elif how == 4:
        axis["tensor"] = rng.choice((*odd.TEXTS, *graph["tensors"]))
    elif how == 5:
        axis["axis"] = rng.choice((1, 7, *odd.NUMBERS))
    elif how == 6:
        graph["tensors"][rng.choice(list(graph["tensors"]))] = rng.choice(
            ({"shape": [2**63]}, {"shape": "x"}, odd.value(rng))
        )
    elif how == 7:
        graph["spaces"] = rng.choice(
            ([], graph["spaces"] * 2, graph["spaces"][:1], graph["spaces"][::-1], odd.value(rng))
        )
    else:
        graph["format"] = rng.choice(("mergeid.graph/2", "mergeid.plan/1", odd.value(rng)))
    return graph
