"""Recipes: YAML of every shape, and valid ones whose result is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from .. import odd
from ..case import Case, campaign
from ..files import Table, averaged, pair, safetensors

METHODS = (
    "linear",
    "slerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "model_stock",
    "fisher",
    "regmean",
)
BASED = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")
NAMES = ["layers.0.mlp.weight", "layers.1.attn.weight", "head"]
TEXTS = (
    "", "---\n", "a", "- a\n- b\n", "models: &a [*a]\n", "? [a]\n: b\n",
    "!!python/object/apply:os.system ['touch PWNED']\n",
    "!!binary aGk=\n", "merge_method: linear\n---\nmerge_method: ties\n",
    "merge_method: linear\nmerge_method: ties\n", "\t",
    "%YAML 9.9\n---\na: 1\n", "{", "[", "'", "a: b: c", "merge_method: !!set {a, b}\n", "models: 2020-01-01\n",
    "merge_method: linear\nmodels: {a: 1}\n", "merge_method: linear\nmodels: 1:30:00\n", "<<: {merge_method: linear}\n",
)  # fmt: skip


@campaign("recipes", share=10, processes=200)
def recipes(rng: random.Random, folder: Path) -> Case:
    tables = dict(zip("ab", pair(rng, NAMES, [[3, 2], [2, 2], [4]]), strict=True))
    tables["c"] = pair(rng, NAMES, [[3, 2], [2, 2], [4]])[0]
    for name, table in tables.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors(table, {"format": "pt"}))
    codes, check = frozenset({0, 1, 2}), None
    roll = rng.random()
    if roll < 0.08:
        recipe, check = _linear(rng, tables)
        codes = frozenset({0})
        text = yaml.safe_dump(recipe) if rng.random() < 0.5 else json.dumps(recipe)
    elif roll < 0.75:
        text = _dumped(rng, odd.damaged(rng, _recipe(rng)) if rng.random() < 0.8 else _recipe(rng))
    elif roll < 0.85:
        text = rng.choice((rng.choice(TEXTS), _bomb(rng), odd.deep(rng), odd.text(rng)))
    else:
        text = odd.damaged_bytes(rng, yaml.safe_dump(_recipe(rng)).encode()).decode("latin-1")
    raw = text.encode("utf-8", "surrogatepass") if roll < 0.85 else text.encode("latin-1")
    (folder / "r.yaml").write_bytes(raw)
    words = ["merge", "r.yaml", "-o", "o.safetensors", "--match", "never", *(["--json"] if rng.random() < 0.1 else [])]
    return Case(words, ("o.safetensors", "mergeid.json"), codes, check)


def _linear(rng: random.Random, tables: dict[str, Table]) -> tuple[Any, Any]:
    """A weighted average, with weights that sum to 1, or that need not since they are normalised (mergekit's way)."""
    used = rng.choice((["a", "b"], ["a", "b", "c"], ["c", "a"]))
    weights = [rng.choice((0.1, 0.25, 0.5, 1.0, 2.0)) for _ in used]
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": f"{n}.safetensors", "parameters": {"weight": w}} for n, w in zip(used, weights, strict=True)
        ],
        **({"dtype": "float32"} if rng.random() < 0.3 else {}),
    }
    shares = [w / sum(weights) for w in weights]
    return recipe, lambda folder: averaged(folder / "o.safetensors", [tables[n] for n in used], shares)


def _recipe(rng: random.Random) -> dict[str, Any]:
    method = rng.choice(METHODS)
    models = [
        {"model": f"{n}.safetensors", "parameters": {"weight": _setting(rng)}} for n in rng.choice(("ab", "abc", "a"))
    ]
    if rng.random() < 0.3:
        for model in models:
            model["parameters"]["density"] = _setting(rng)  # type: ignore[index]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": {"normalize": rng.random() < 0.5}}
    if method in BASED or rng.random() < 0.1:
        recipe["base_model"] = "c.safetensors"
    if method == "slerp":
        recipe |= {"base_model": "a.safetensors", "parameters": {"t": _setting(rng)}}
    if method in ("fisher", "regmean", "karcher"):
        recipe["parameters"] = {rng.choice(("alpha", "max_iter", "tol")): rng.choice(odd.NUMBERS)}
    for key in ("dtype", "tokenizer_source", "slices", "out_dtype", "chat_template"):
        if rng.random() < 0.06:
            recipe[key] = rng.choice(("float16", "bfloat16", odd.value(rng)))
    return recipe


def _setting(rng: random.Random) -> Any:
    return rng.choice(
        (0.5, 1, 0.3, [0.1, 0.9], [0, 0.5, 1], {"filter": "mlp", "value": 0.2}, rng.choice(odd.NUMBERS), odd.value(rng),
         [{"filter": "mlp", "value": 0.2}, {"value": 0.7}], [{"filter": "attn", "value": [0, 1]}, {"value": 1}])
    )  # fmt: skip


def _dumped(rng: random.Random, recipe: Any) -> str:
    if rng.random() < 0.4:
        return json.dumps(recipe, ensure_ascii=rng.random() < 0.5)
    try:
        return yaml.safe_dump(recipe, allow_unicode=rng.random() < 0.5)
    except (yaml.YAMLError, ValueError, UnicodeError):
        return json.dumps(recipe)


def _bomb(rng: random.Random) -> str:
    """Aliases of aliases: a small file, and a billion of values."""
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, rng.choice((4, 9, 12)))]
    last = len(lines) - 1
    where = rng.choice(
        (f"models: *x{last}", f"merge_method: *x{last}", f"parameters: {{weight: *x{last}}}", f"dtype: *x{last}")
    )
    return "\n".join([*lines, *(["merge_method: linear"] if "method" not in where else []), where]) + "\n"
