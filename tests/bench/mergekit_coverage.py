"""All that mergekit 0.1.5 documents, and whether mergeid gives the same: every field of its recipes, every method with
every parameter, every named chat template, every option of its commands, and every example.

    python tests/bench/mergekit_coverage.py [--examples FOLDER]

The list is mergekit's own: its pydantic models, its registry of methods, its folder of templates and its commands are
read in this run. Every recipe of `mergekit_parity` and `mergekit_moe_parity` is run through both tools, and each entry
of the list gets the recipes that use it. Options of commands are given to both, ours by the names in `WORDS`; those
without one must be refused by mergeid with a reason.

Writes ``tables/mergekit_coverage.csv``: kind, entry, recipes that use it, how many are the same, how many one of the
two refuses, and the largest difference (absolute, and in units of the last place). An entry that nothing uses is an
error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import mergekit_moe_parity as mixtures
import mergekit_parity as parity
import torch
import yaml
from click.testing import CliRunner
from mergekit._data import chat_templates
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import registered_methods
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.extract_lora import main as lora_command
from mergekit.scripts.merge_raw_pytorch import main as raw_command
from mergekit.scripts.moe import main as moe_command
from mergekit.scripts.multimerge import main as multi_command
from mergekit.scripts.run_yaml import main as yaml_command
from mergekit_recipes import RECIPES, models
from pydantic import BaseModel
from safetensors.torch import load_file

TABLE = Path(__file__).parent / "tables" / "mergekit_coverage.csv"
Entry = tuple[str, str]
"""Kind and name."""

WORDS: dict[str, tuple[list[str], list[str]]] = {
    "--out-shard-size": (["20000"], ["--shard-size", "80KB"]),
    "--random-seed": (["3"], ["--seed", "3"]),
    "--lazy-unpickle": ([], ["--allow-pickle"]),
    "--device": (["cpu"], ["--device", "cpu"]),
    "--allow-crimes": ([], ["--config", "a"]),
    "--write-threads": (["2"], []),
    "--num-threads": (["1"], []),
    "--lora-merge-cache": (["cache"], []),
    "--lora-merge-dtype": (["float32"], []),
    **{
        option: ([], [])
        for option in (
            "--copy-tokenizer", "--clone-tensors", "--safe-serialization", "--async-write", "--quiet", "-v",
            "--write-model-card", "--low-cpu-memory", "--i-understand-this-is-not-useful-without-training", "--lazy",
            "--out-path", "--intermediate-dir",
        )
    },
}  # fmt: skip
"""Option of mergekit -> its value there, and mergeid's words for the same. Of the others mergeid must say why not."""
EXERCISED = {
    "--random-seed": RECIPES["dare_ties"],
    "--lazy-unpickle": {"merge_method": "linear", "models": models("pickled/a", "pickled/b", weight=[0.3, 0.7])},
    "--lora-merge-cache": RECIPES["model with lora"],
    "--lora-merge-dtype": RECIPES["model with lora"],
    "--clone-tensors": RECIPES["slices: scaled copies"],
    "--allow-crimes": {"merge_method": "linear", "models": models("llama/a", "mistral/b", weight=[0.3, 0.7])},
}
"""Recipes in which an option has something to do; the others are tried on a plain average."""


def make_pickles(work: Path) -> None:
    """a and b again, as pickles."""
    for name in ("a", "b"):
        place = work / "pickled" / name
        place.mkdir(parents=True)
        shutil.copy(work / "float32" / name / "config.json", place)
        torch.save(load_file(work / "float32" / name / "model.safetensors"), place / "pytorch_model.bin")


# --- the list ------------------------------------------------------------------------------------------------------


def nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from nested(part)


def fields(model: type[BaseModel], seen: dict[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """That model and all that it is made of, by name."""
    if model.__name__ not in seen:
        seen[model.__name__] = model
        for field in model.model_fields.values():
            for part in nested(field.annotation):
                fields(part, seen)
    return seen


def options(command: Any) -> list[str]:
    """The first spelling of every option of a command."""
    names = [p.opts[0] if p.opts[0].startswith("-") else p.opts[-1] for p in command.params]
    return [name for name in names if name.startswith("-") and name != "--help"]


COMMANDS = {"mergekit-yaml": yaml_command, "mergekit-multi": multi_command, "mergekit-moe": moe_command}
MODELS = fields(MoEMergeConfig, fields(MergeConfiguration, {}))
METHODS = registered_methods()
METHODS = METHODS if isinstance(METHODS, dict) else {m.spec.name: m for m in METHODS}


def documented() -> list[Entry]:
    """Every entry."""
    found = [("field", f"{name}.{field}") for name, model in MODELS.items() for field in model.model_fields]
    for name, method in METHODS.items():
        found += [("method", name), *(("parameter", f"{name}: {p.name}") for p in method.spec.parameters)]
    templates = sorted(p.stem for p in Path(chat_templates.__file__).parent.glob("*.jinja"))
    found += [("chat template", name) for name in ("auto", *templates)]
    found += [("gate mode", mode) for mode in ("hidden", "cheap_embed", "random", "uniform_random")]
    found += [("tokenizer", source) for source in ("union", "base", "a model")]
    found += [("token", source) for source in ("a model", "model_token", "zero")]
    found += [("setting", kind) for kind in ("scalar", "switch", "text", "gradient", "conditions")]
    return found


# --- what a recipe uses ----------------------------------------------------------------------------------------------


def used(model: type[BaseModel], data: Any, method: str) -> Iterator[Entry]:
    """The entries that a table of a recipe uses."""
    if model.__name__ == "ModelReference" and isinstance(data, str):
        base, _, lora = data.partition("+")
        data = {"model": base, **({"lora": lora} if lora else {})}
    if model.__name__ == "ModelPath" and isinstance(data, str):
        path, _, revision = data.partition("@")
        data = {"path": path, **({"revision": revision} if revision else {})}
    for key, value in data.items() if isinstance(data, dict) else ():
        field = model.model_fields.get(key)
        if field is None or value is None:
            continue
        yield "field", f"{model.__name__}.{key}"
        if key == "parameters":
            yield from of_parameters(value, method)
            continue
        several = list(nested(field.annotation))
        inside = value if isinstance(value, list) else list(value.values()) if is_named(field) else [value]
        for one in inside if isinstance(inside, list) else [inside]:
            for part in several:
                if fits(part, one):
                    yield from used(part, one, method)


def is_named(field: Any) -> bool:
    """Whether a field is a table of things by their names."""
    return bool(re.match(r"(typing\.)?(Optional\[|Union\[)?(typing\.)?Dict", str(field.annotation), re.IGNORECASE))


def fits(model: type[BaseModel], data: Any) -> bool:
    if isinstance(data, str):
        return model.__name__ in ("ModelReference", "ModelPath")
    return isinstance(data, dict) and any(key in model.model_fields for key in data)


def of_parameters(told: dict[str, Any], method: str) -> Iterator[Entry]:
    for name, value in told.items():
        yield "parameter", f"{method}: {name}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield "setting", "conditions"
                yield from (("field", f"ConditionalParameter.{key}") for key in one)
                one = one["value"]
                yield "setting", "gradient" if isinstance(one, list) else "scalar"
            elif isinstance(value, list):
                yield "setting", "gradient"
            if isinstance(one, (bool, str)):
                yield "setting", "switch" if isinstance(one, bool) else "text"
        if not isinstance(value, (list, dict)):
            yield "setting", "scalar"


def of_recipe(text: str) -> set[Entry]:
    """All that the documents of a recipe use."""
    found: set[Entry] = set()
    for told in yaml.safe_load_all(text):
        method = str(told["merge_method"])
        found |= {("method", method), *used(MergeConfiguration, told, method)}
        if "chat_template" in told:
            found.add(("chat template", told["chat_template"]))
        tokens = told.get("tokenizer") or {}
        source = told.get("tokenizer_source") or tokens.get("source")
        if source is not None:
            found.add(("tokenizer", source if source in ("union", "base") else "a model"))
        for one in (tokens.get("tokens") or {}).values():
            row = one.get("source")
            found.add(("token", row["kind"] if isinstance(row, dict) else "a model"))
    return found


def of_mixture(told: dict[str, Any]) -> set[Entry]:
    return {("gate mode", told["gate_mode"]), *used(MoEMergeConfig, told, "")}


# --- options of commands ---------------------------------------------------------------------------------------------


def of_command(command: str, work: Path) -> list[dict[str, Any]]:
    """A row for every option of a command of mergekit, given to both tools."""
    rows = []
    for option in options(COMMANDS[command]):
        entry = {"kind": command, "entry": option, "recipes": 1, "same": 0, "refused": 0, "largest": "", "units": ""}
        ours = refusal(option, work, command)
        if option not in WORDS:
            rows.append({**entry, "refused": 1, "said": ours})
            continue
        theirs, words = WORDS[option]
        row = compared(command, option, theirs, words, work)
        how = " ".join(words) or ("as it is" + f": {ours}" * bool(ours))
        same = row["outcome"].startswith("same")
        entry |= {"same": int(same), "refused": 0 if same else 1, "largest": row["largest"], "units": row["units"]}
        rows.append({**entry, "said": how if same else row["said"] or row["outcome"]})
    return rows


def once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options that all commands share in one row each: they are the same for mergekit, and tried in every command."""
    found = []
    for row in rows:
        several = [r for r in rows if r["entry"] == row["entry"]]
        if len(several) < len(COMMANDS):
            found.append(row)
        elif row is several[0]:
            total = {key: sum(r[key] for r in several) for key in ("recipes", "same", "refused")}
            worst = {k: max((r[k] for r in several if r[k]), key=float, default="") for k in ("largest", "units")}
            found.append({**row, "kind": "option", **total, **worst})
    return found


def refusal(option: str, work: Path, command: str) -> str:
    """What mergeid says of an option of mergekit that it does not have; empty: it has it."""
    from mergeid.commands.cli import run

    told = io.StringIO()
    verb = "moe" if command == "mergekit-moe" else "merge"
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        run([verb, str(work / "none.yaml"), "-o", str(work / "none"), option])
    said = " ".join(told.getvalue().split())
    return said.partition("which is mergekit's: ")[2].partition("; see mergeid")[0]


def compared(command: str, option: str, theirs: list[str], words: list[str], work: Path) -> dict[str, Any]:
    """One option given to both tools, with the same random masks."""
    name = f"{command}{option}"
    if command == "mergekit-moe":
        recipe = mixtures.RECIPES["llama random" if option == "--random-seed" else "llama cheap_embed"]
        if option.startswith("--i-understand"):
            recipe = {**recipe, "experts": [{**one, "source_model": "llama/a"} for one in recipe["experts"]]}
        place, ours, other = work / f"{name}.yaml", work / f"{name}.ours", work / f"{name}.theirs"
        place.write_text(yaml.safe_dump(recipe))
        failed = mixtures.by_mergeid(place, ours, *words), mixtures.by_mergekit(place, other, option, *theirs)
        judge = mixtures.judged
    else:
        told = [EXERCISED.get(option, RECIPES["linear"])]
        if command == "mergekit-multi":
            told = [{**told[0], "name": "first"}, {"merge_method": "passthrough", "models": models("first")}]
        place, ours, other = work / f"{name}.yaml", work / f"{name}.ours", work / f"{name}.theirs"
        place.write_text(yaml.safe_dump_all(parity.placed(one, "float32") for one in told))
        given = [] if option in ("--out-path", "--intermediate-dir") else [option, *theirs]
        with parity.same_masks():
            failed = parity.by_mergeid(place, ours, *words), parity.by_mergekit(place, other, *given)
        judge = parity.judged
    if any(failed):
        return {"outcome": "refused", "largest": "", "units": "", "said": " | ".join(failed)[:300]}
    return {"largest": "", "units": "", "said": "", **judge(ours, other, "same")}


def of_files(work: Path) -> list[dict[str, Any]]:
    """Rows of ``mergekit-pytorch``: state dicts in files, with the same recipes."""
    base, *fine = (f"float32/{name}/model.safetensors" for name in ("base", "a", "b"))
    recipes = {
        "linear": {"merge_method": "linear", "models": models(*fine, weight=[0.3, 0.7])},
        "ties": {
            "merge_method": "ties", "base_model": base,
            "models": [{"model": base}, *models(*fine, weight=[0.3, 0.7], density=[0.5, 0.4])],
        },
    }  # fmt: skip
    shared = options(yaml_command)
    rows = [
        {**row_of(("mergekit-pytorch", option), []), "recipes": 1, "refused": 1, "said": refusal(option, work, "")}
        for option in options(raw_command)
        if option not in shared
    ]
    for name, recipe in recipes.items():
        place = work / f"pytorch-{name}.yaml"
        place.write_text(yaml.safe_dump(recipe))
        ours, theirs = place.with_suffix(".ours"), place.with_suffix(".theirs")
        done = CliRunner().invoke(raw_command, [str(place), str(theirs)])
        failed = parity.by_mergeid(place, ours) or done.exception
        row = {"outcome": "refused", "said": repr(failed)} if failed else parity.judged(ours, theirs, "same")
        rows.append(row_of(("mergekit-pytorch", name), [{"largest": "", "units": "", "said": "", **row}]))
    return rows


def of_extract(work: Path) -> dict[str, Any]:
    """The row of ``mergekit-extract-lora``: the products of both tools' factors, of rank 4, for every linear layer."""
    from mergeid.commands.cli import run

    words = ["--model", "float32/a", "--base-model", "float32/base", "--out-path", "lora.theirs", "--max-rank", "4"]
    with mock.patch("huggingface_hub.repo_exists", lambda *_, **__: False):  # asked for the model card
        done = CliRunner().invoke(lora_command, words)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        code = run(["extract", "float32/a", "--base", "float32/base", "--rank", "4", "-o", "lora.ours"])
    if code or done.exception:
        raise SystemExit(f"no adapters: {code}, {done.exception!r}")
    ours, theirs = (products(work / f"lora.{whose}") for whose in ("ours", "theirs"))
    both = ours.keys() & theirs.keys()
    far, units = parity.difference({n: ours[n] for n in both}, {n: theirs[n] for n in both})
    same = far <= parity.TOLERANCE and len(both) == len(theirs)
    return {
        "kind": "mergekit-extract-lora", "entry": f"{len(both)} products", "recipes": 1, "same": int(same),
        "refused": 0, "largest": f"{far:.1e}", "units": f"{units:.3g}", "said": "" if same else "other layers",
    }  # fmt: skip


def products(folder: Path) -> dict[str, Any]:
    """Scaled update of every layer that an adapter has factors for."""
    told = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight"
    pairs = {n.removesuffix(ends): (factors[n], factors[n.replace("lora_A", "lora_B")]) for n in factors if ends in n}
    return {name: told["lora_alpha"] / len(a) * (b.double() @ a.double()).float() for name, (a, b) in pairs.items()}


# --- the table -------------------------------------------------------------------------------------------------------


def row_of(entry: Entry, uses: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the recipes that use an entry."""
    same = [r for r in uses if r["outcome"].startswith("same")]
    refused = [r for r in uses if parity.is_decided(r) and r not in same]
    said = "" if same else next((r["said"] for r in refused), "")
    largest = max((float(r["largest"]) for r in same), default=None)
    units = max((float(r["units"]) for r in same), default=None)
    return {
        "kind": entry[0],
        "entry": entry[1],
        "recipes": len(uses),
        "same": len(same),
        "refused": len(refused),
        "largest": "" if largest is None else f"{largest:.1e}",
        "units": "" if units is None else f"{units:.3g}",
        "said": said,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--commands", action="store_true", help="only the options of commands")
    parser.add_argument("--examples", type=Path, help="mergekit's examples folder")
    chosen = parser.parse_args()
    recipes = parity.every_recipe(chosen.examples)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        work = Path(folder)
        rows = parity.rows_of({} if chosen.commands else recipes, work)
        made = mixtures.rows_of({} if chosen.commands else mixtures.RECIPES, work)
        make_pickles(work)
        commands = once([row for command in COMMANDS for row in of_command(command, work)])
        commands += [*of_files(work), of_extract(work)]
    if chosen.commands:
        for row in commands:
            print(*row.values(), sep="  ")
        return 0
    parity.written(rows, parity.TABLE)
    parity.written(made, mixtures.TABLE)
    uses = [(of_recipe(recipes[row["recipe"]]), row) for row in rows]
    uses += [(of_mixture(mixtures.RECIPES[row["recipe"]]), row) for row in made]
    table = [row_of(entry, [row for of, row in uses if entry in of]) for entry in documented()]
    table += commands
    table += [row_of(("example", r["recipe"]), [r]) for r in rows if r["recipe"].startswith("examples/")]
    parity.written(table, TABLE)
    decided = [
        r for r in table if r["recipes"] and r["same"] + r["refused"] == r["recipes"] and (r["same"] or r["said"])
    ]
    same = [r for r in table if r["same"]]
    for row in table:
        if row not in decided:
            print("UNDECIDED", *row.values(), sep="  ")
    print(f"{len(table)} entries: {len(decided)} decided, {len(same)} the same ({100 * len(same) / len(table):.1f} %)")
    return 0 if len(decided) == len(table) else 1


if __name__ == "__main__":
    sys.exit(main())
