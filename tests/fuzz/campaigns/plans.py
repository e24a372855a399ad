"""Saved plans, as somebody would correct them by hand, or send those of other models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from . import models


@campaign("plans", share=0.6, processes=100)
def plans(rng: random.Random, folder: Path) -> Case:
    models.put(folder, "a", "b")
    plan = json.loads(models.content(rng.choice(("p.json", "pd.json"))))
    valid = rng.random() < 0.05
    if not valid:
        plan = odd.damaged(rng, plan) if rng.random() < 0.4 else _meant(rng, plan)
    (folder / "plan.json").write_bytes(odd.written(rng, plan, 0.0 if valid else 0.07))
    words = ["merge", "a", "b", "--plan", "plan.json", "-o", "o", "--force"]
    if rng.random() < 0.3:
        words = ["align", "b", "--to", "a", "--plan", "plan.json", "-o", "o"]
    return Case(words, ("o",), codes=frozenset({0}) if valid else frozenset({0, 1, 2}))


def _meant(rng: random.Random, plan: Any) -> Any:
    """The parts that mean something, changed one at a time."""
    name = rng.choice([*plan["permutations"], "s99"])
    order = list(plan["permutations"].get(name, [0, 1]))
    how = rng.randrange(7)
    if how == 0 and order:
        order[rng.randrange(len(order))] = rng.choice((0, -1, len(order), *odd.NUMBERS, None, "x", [1]))
        plan["permutations"][name] = order
    elif how == 1:
        plan["permutations"][name] = rng.choice(([], order[:-1], order[::-1], [order], odd.value(rng)))
    elif how == 2:
        prints = plan["fingerprints"]
        plan["fingerprints"] = rng.choice(([], prints[:1], prints[::-1], prints * 2, odd.value(rng)))
    elif how == 3:
        key = rng.choice(("match", "evidence", "examples", "format"))
        plan[key] = rng.choice((odd.value(rng), *odd.NUMBERS))
    elif how == 4 and plan["spaces"]:
        space = rng.choice(plan["spaces"])
        space[rng.choice(list(space))] = odd.value(rng)
    elif how == 5:
        spaces = plan["spaces"]
        plan["spaces"] = rng.choice(([], spaces * 2, spaces[::-1], spaces[:1], odd.value(rng)))
    else:
        plan[odd.text(rng)] = odd.value(rng)
    return plan
