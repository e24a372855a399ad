"""Merge methods tensor by tensor beside mergekit 0.1.5, on a small Llama and a small BERT: the same recipe to both.

    python tests/bench/compare_mergekit.py

Makes a base and two fine-tunes of each (random weights from a seed, float32), makes a virtual environment with mergekit
(or uses the one given), runs every recipe through both tools and prints the largest difference. Exit code 1 where one
exceeds 1e-5 and is not one of the three explained:

- mergekit's slerp is a straight line above a cosine of 0.9995, which is off the great circle by a share of at most
  (1 − cos θ) / 4; mergeid follows the circle.
- TIES keeps the largest elements of a task vector. mergekit sorts float32 differences and breaks ties by position;
  mergeid takes the differences exactly and keeps all that tie with the last. Elements within rounding of the cut may
  thus differ.
- mergekit's Karcher mean takes angles as the arc cosine of float32 dot products, which is off by up to 5e-4 rad for
  nearly parallel tensors. There mergeid is held against the bisector in float64 instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merge_vs_mergekit import mergekit_command

TOLERANCE = 1e-5
THRESHOLD = 0.9995
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b", "parameters": {"weight": 0.7}}],
    },
    "linear, gradient and filter": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 0.5, 0.9]}},
            {"model": "b", "parameters": {"weight": [{"filter": "attention", "value": 0.8}, {"value": [1.0, 0.0]}]}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": 0.4},
    },
    "slerp, gradient": {
        "merge_method": "slerp",
        "base_model": "a",
        "models": [{"model": "b"}],
        "parameters": {"t": [0, 0.5, 1]},
    },
    "task arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": -0.3}}],
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.7}},
        ],
    },
    "ties, sums": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "base"},
            {"model": "a", "parameters": {"weight": 0.6}},
            {"model": "b", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"normalize": False, "int8_mask": True, "density": [0.2, 0.8], "lambda": 1.2},
    },
    "model stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
    },
    "karcher": {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mergeid-bench"
    parser.add_argument("--work", type=Path, default=cache, help="folder for models, outputs and the environment")
    parser.add_argument("--mergekit-venv", type=Path, help="environment that has mergekit (default: one in --work)")
    parser.add_argument("--models", nargs="+", choices=("llama", "bert"), default=("llama", "bert"))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def make_models(folder: Path, kind: str) -> None:
    """``base``, ``a`` and ``b``: the latter two the base and noise, small on some tensors and large on others."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    else:
        model = BertForSequenceClassification(BertConfig(**sizes))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for i, (key, value) in enumerate(base.items()):
            noise = torch.randn(value.shape, generator=generator) * (0.02, 0.005, 0.0002)[i % 3]
            state[key] = value + noise * (seed > 0)
        model.load_state_dict(state)
        model.save_pretrained(folder / name)


def placed(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with absolute paths: mergekit takes others for hub ids."""
    models = [{**entry, "model": str(folder / entry["model"])} for entry in recipe["models"]]
    base = {"base_model": str(folder / recipe["base_model"])} if "base_model" in recipe else {}
    return {**recipe, **base, "models": models}


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def compare(ours: Path, theirs: Path, folder: Path, recipe: Path) -> dict[str, Any]:
    """Largest absolute difference, and apart from it those that are explained (see the module's text)."""
    from mergeid.methods.recipe import read_stages
    from mergeid.methods.registry import get_method
    from mergeid.methods.settings import MergeSettings

    x, y = tensors_of(ours), tensors_of(theirs)
    inputs = {name: tensors_of(folder / name) for name in ("base", "a", "b")}
    (told,) = read_stages(recipe)
    settings = MergeSettings.of(
        get_method(told.method), 2, x, weights=told.weights, parameters=told.parameters, normalize=told.normalize
    )
    found: dict[str, Any] = {"difference": 0.0, "at": "", "line": 0.0, "angle": 0.0, "cut": 0.0, "cut_elements": 0}
    common = sorted(set(x) & set(y))
    for name in common:
        off = (x[name].double() - y[name].double()).abs()
        base, a, b = (inputs[k][name].double() for k in ("base", "a", "b"))
        cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))
        if told.method == "slerp" and cosine > THRESHOLD:
            bound = (1 - cosine) / 4 * float(a.abs().maximum(b.abs()).max()) + 1e-6
            if float(off.max()) <= bound:
                found["line"] = max(found["line"], float(off.max()))
                continue
        if told.method == "karcher" and cosine > THRESHOLD:
            between = a / a.norm() + b / b.norm()
            bisector = between / between.norm() * (a.norm() + b.norm()) / 2
            if float((x[name].double() - bisector).abs().max()) <= 1e-6:
                found["angle"] = max(found["angle"], float(off.max()))
                continue
        if told.method == "ties":
            near = at_the_cut(base, (a, b), settings.keywords(name)["density"]) & (off > TOLERANCE)
            if near.any():
                found["cut"] = max(found["cut"], float(off[near].max()))
                found["cut_elements"] += int(near.sum())
            off[near] = 0
        if float(off.max()) > found["difference"]:
            found["difference"], found["at"] = float(off.max()), name
    return {**found, "tensors": len(common), "only": sorted(set(x) ^ set(y))}


def at_the_cut(base: Any, models: tuple[Any, ...], density: list[float]) -> Any:
    """Elements of which some model's difference to the base is within float32 rounding of its density's cut."""
    import torch

    near = torch.zeros(base.shape, dtype=torch.bool)
    for model, share in zip(models, density, strict=True):
        size = (model - base).abs()
        cut = size.flatten().sort(descending=True).values[max(1, int(share * size.numel())) - 1]
        near |= (size - cut).abs() <= 2.0**-23 * base.abs().maximum(model.abs())
    return near


def main() -> int:
    chosen = options()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    mergekit = mergekit_command(chosen.mergekit_venv or work / "venv")
    figures: dict[str, Any] = {}
    for kind in chosen.models:
        folder = work / f"compare-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_models(folder, kind)
        for name in chosen.recipes:
            recipe = RECIPES[name]
            file = folder / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
            file.write_text(json.dumps({**placed(recipe, folder), "dtype": "float32"}))
            run([mergekit, str(file), f"{file.stem}-mergekit", "--quiet"], folder)
            command = [sys.executable, "-m", "mergeid", "merge", str(file), "--match", "never"]
            run([*command, "-o", f"{file.stem}-mergeid"], folder)
            found = compare(folder / f"{file.stem}-mergeid", folder / f"{file.stem}-mergekit", folder, file)
            figures[f"{kind}: {name}"] = found
            print(
                f"{kind:6} {name:28} {found['tensors']:3} tensors  largest difference {found['difference']:.1e}"
                + (f"  (line instead of circle: {found['line']:.1e})" if found["line"] > TOLERANCE else "")
                + (f"  (angle in float32: {found['angle']:.1e})" if found["angle"] > TOLERANCE else "")
                + (f"  (at the cut: {found['cut_elements']} elements, {found['cut']:.1e})" if found["cut"] else "")
                + (f"  only in one: {', '.join(found['only'])}" if found["only"] else ""),
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    missed = [name for name, found in figures.items() if found["difference"] > TOLERANCE]
    print(f"MISSED: {', '.join(missed)}" if missed else f"equal to {TOLERANCE:g}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
