"""Every merge method and option that mergekit 0.1.5 has, through both tools in one process: the same recipe, the same
tiny models, the same random masks.

    python tests/bench/mergekit_parity.py [PATTERN] [--examples FOLDER]

Needs an environment with mergekit 0.1.5 and mergeid (mergekit pins nothing that mergeid does not take:
``pip install mergekit==0.1.5``). Makes a base and three fine-tunes of a small Llama (random weights from a seed), runs
every recipe below, and those of mergekit's own ``examples/`` with stand-ins for their models, and writes
``tables/mergekit_parity.csv``: recipe, what became of it, largest difference of a tensor (absolute, and in units of the
last place of its largest element).

Both draw their masks from the same uniform numbers, one list per number of elements. What may differ:

- mergekit computes in the dtype of the recipe, mergeid in float32 or float64, and rounds once. Where the results differ
  by more than a rounding, mergekit runs again with ``dtype: float64`` and the recipe's dtype for the output;
- 16-bit task vectors have many equal magnitudes. Of those at the cut mergekit keeps some, by their place; mergeid keeps
  all, so that the order of neurons does not matter (TIES, SCE). mergekit then runs a third time with that rule;
- with ``tokenizer: {source: base}``, mergekit takes tokens that it adds itself for tokens of the base, and their rows
  from the base's padding;
- mergekit's slerp is a straight line above a cosine of 0.9995, off the circle by a share of (1 − cos θ) / 4 at most;
- mergekit's Karcher mean takes angles as the arc cosine of float32 dot products.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import io
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(
    OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", HF_HUB_CACHE=tempfile.mkdtemp()
)

import numpy as np
import torch
import yaml
from mergekit_models import CONVERSATIONS, make_models, make_models_of_parts
from mergekit_recipes import FOLDERS, PLACES, RECIPES, STAGES
from safetensors.torch import load_file
from transformers import AutoTokenizer

TABLE = Path(__file__).parent / "tables" / "mergekit_parity.csv"
TOLERANCE = 1e-5
EXACT = "same as in float64"
"""What becomes of recipes where mergekit's own arithmetic is the difference."""
TIED = "same but for equal magnitudes at the cut"
"""The same in float64, where mergekit keeps all that ties with the smallest that it keeps."""


@contextlib.contextmanager
def same_masks() -> Iterator[None]:
    """Both tools compare the same uniform numbers with their probabilities, one list per number of elements, and rank
    equal magnitudes in the same order."""
    import mergeid.methods.della as della
    import mergeid.methods.sparse as sparse
    from mergeid.methods.registry import MergeMethod

    def uniform(size: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(size).random(size, dtype=np.float32))

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        drawn = uniform(probabilities.numel()).reshape(probabilities.shape)
        return (drawn < probabilities).to(probabilities.dtype)

    class Ours:
        """Those numbers from the first element on; their count is known when the tensor is."""

        def __init__(self, generator: Any) -> None:
            self.size = sizes[-1]

        def begin(self) -> Callable[[int], torch.Tensor]:
            numbers, at = uniform(self.size), [0]

            def draw(count: int) -> torch.Tensor:
                at[0] += count
                return numbers[at[0] - count : at[0]]

            return draw

    sizes: list[int] = []
    formed = MergeMethod.formed

    def watched(method: MergeMethod, tensors: Any, weights: Any, **needs: Any) -> Any:
        sizes.append(tensors[0].numel())
        return formed(method, tensors, weights, **needs)

    def stable(sort: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *words, **told: sort(x, *words, **{**told, "stable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.bernoulli", bernoulli))
        stack.enter_context(mock.patch("torch.argsort", stable(torch.argsort)))
        stack.enter_context(mock.patch.object(torch.Tensor, "argsort", stable(torch.Tensor.argsort)))
        stack.enter_context(mock.patch.object(MergeMethod, "formed", watched))
        stack.enter_context(mock.patch.object(sparse, "Uniform", Ours))
        stack.enter_context(mock.patch.object(della, "Uniform", Ours))
        yield


def by_mergekit(recipe: Path, out: Path, *more: str) -> str:
    """What mergekit says where it fails; empty: it wrote `out`."""
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main as multimerge
    from mergekit.scripts.run_yaml import main as run_yaml

    several = len(list(yaml.safe_load_all(recipe.read_text()))) > 1
    words = [str(recipe), str(out)]
    if several:
        words = [str(recipe), "--out-path", str(out), "-I", str(out.with_suffix(".between"))]
    words += ["--lora-merge-cache", str(out.parent / "lora-cache"), *more]
    words += ["--quiet"] * ("-v" not in more) + ["--no-write-model-card"] * ("--write-model-card" not in more)

    def listed(path: str, **told: Any) -> list[str]:  # it asks the hub, also where all is in the cache
        from huggingface_hub import snapshot_download

        return [f.name for f in Path(snapshot_download(path, revision=told.get("revision"))).iterdir()]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("huggingface_hub.list_repo_files", listed))
        stack.enter_context(mock.patch("huggingface_hub.repo_exists", lambda *_, **__: False))
        stack.enter_context(mock.patch("torch.set_num_interop_threads", lambda _: None))  # works once per process
        done = CliRunner().invoke(multimerge if several else run_yaml, words)
    return "" if done.exit_code == 0 else repr(done.exception or done.output[-200:])


def by_mergeid(recipe: Path, out: Path, *more: str) -> str:
    """The sentence with which mergeid refuses; empty: it wrote `out`."""
    from mergeid.commands.cli import run

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run(["merge", str(recipe), "-o", str(out), "--match", "never", *more])
    return "" if not code else told.getvalue().strip().removeprefix("mergeid: error: ")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference, absolute and in units of the last place of our tensor's largest element."""
    largest = units = 0.0
    for name in theirs:
        x, y = ours[name].double(), theirs[name].double()
        far = float((x - y).abs().max())
        unit = 2.0 ** math.floor(math.log2(float(y.abs().max()) or 1.0)) * torch.finfo(ours[name].dtype).eps
        largest, units = max(largest, far), max(units, far / unit)
    return largest, units


def compare(name: str, text: str, work: Path) -> dict[str, Any]:
    """One row of the table."""
    recipe = work / f"{name.replace(' ', '_').replace('/', '_')}.yaml"
    told = list(yaml.safe_load_all(text))
    dtype = told[-1].get("out_dtype") or told[-1].get("dtype") or "float32"
    told = [placed(one, dtype) for one in told]
    recipe.write_text(yaml.safe_dump_all(told))
    ours, theirs = recipe.with_suffix(".ours"), recipe.with_suffix(".theirs")
    with same_masks():
        refused, failed = by_mergeid(recipe, ours), by_mergekit(recipe, theirs)
    row: dict[str, Any] = {"recipe": name, "outcome": "", "largest": "", "units": "", "said": ""}
    if refused or failed:
        both = "refused by both" if refused and failed else "refused" if refused else "mergekit fails"
        return {**row, "outcome": both, "said": (refused or failed).replace("\n", " ").replace(f"{work}/", "")[:300]}
    row |= judged(ours, theirs, "same")
    if row["outcome"] == "same":
        return row
    exact = recipe.with_suffix(".exact.yaml")
    exact.write_text(yaml.safe_dump_all({**t, "dtype": "float64", "out_dtype": dtype} for t in told))
    for outcome, how in ((EXACT, contextlib.nullcontext), (TIED, ties_kept)):
        out = exact.with_suffix(f".{how.__name__}")
        with same_masks(), how():
            failed = by_mergekit(exact, out)
        found = {} if failed else judged(ours, out, outcome)
        if found.get("outcome") == outcome:
            return {**row, **found, "said": f"with {dtype} arithmetic it is off by {row['largest'] or row['said']}"}
    return row


@contextlib.contextmanager
def ties_kept() -> Iterator[None]:
    """mergekit with all that ties with the smallest that is kept, as mergeid has it."""
    import mergekit.sparsify as sparsify

    sce = sys.modules["mergekit.merge_methods.sce"]
    rescaled, mask_of = sparsify.rescaled_masked_tensor, sce.sce_mask

    def widened(tensor: torch.Tensor, mask: torch.Tensor, *words: Any, **told: Any) -> torch.Tensor:
        size = tensor.abs()
        if bool(mask.any()) and not bool((size[mask == 0] > size[mask != 0].min()).any()):  # a cut by magnitude
            mask = (size >= size[mask != 0].min()).to(mask.dtype)
        return rescaled(tensor, mask, *words, **told)

    def selected(tvs: torch.Tensor, density: float, mask_dtype: torch.dtype | None = None) -> torch.Tensor:
        mask, variance = mask_of(tvs, density, mask_dtype), torch.var(tvs, dim=0, unbiased=False)
        return (variance >= variance[mask != 0].min()).to(mask.dtype) if bool(mask.any()) else mask

    with mock.patch.object(sparsify, "rescaled_masked_tensor", widened), mock.patch.object(sce, "sce_mask", selected):
        yield


def placed(value: Any, dtype: str, key: str = "") -> Any:
    """A recipe with our models where they lie, in the recipe's dtype; mergekit keeps files open by their path."""
    if isinstance(value, dict):
        return {k: placed(v, dtype, k) for k, v in value.items()}
    if isinstance(value, list):
        return [placed(v, dtype, key) for v in value]
    if key in ("model", "base_model", "source", "path", "lora") and (key, value) != ("source", "base"):
        parts = str(value).split("+")
        return (
            "+".join(f"{dtype}/{p}" if p in PLACES or p.startswith(FOLDERS) else p for p in parts) if value else value
        )
    return value


def rendered(folder: Path) -> list[str]:
    """Every conversation in the chat template of a folder's tokenizer; "refused" where it is refused."""
    from jinja2 import TemplateError

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for conversation in CONVERSATIONS if tokenizer.chat_template else ():
        for begun in (False, True):
            try:
                text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=begun)
            except TemplateError:
                text = "refused"
            found.append(text)
    return found


def by_token(found: dict[str, torch.Tensor], ours: Path, theirs: Path) -> dict[str, torch.Tensor]:
    """Our rows in the order of their tokenizer: mergekit adds tokens in the order of a hash table."""
    rows, order = (AutoTokenizer.from_pretrained(p).get_vocab() for p in (ours, theirs))
    if rows.keys() != order.keys():
        return {**found, f"tokens {sorted(rows.keys() ^ order.keys())}": torch.zeros(1)}
    one, two = (rendered(p) for p in (ours, theirs))
    if one != two:
        pair = next((pair for pair in zip(one, two, strict=False) if pair[0] != pair[1]), ("none", "none"))
        return {**found, f" chat template: {pair[0]!r} and {pair[1]!r}": torch.zeros(1)}
    size = json.loads((ours / "config.json").read_text())["vocab_size"]
    take = torch.arange(size)
    for token, row in order.items():
        take[row] = rows[token]
    return {name: t[take] if t.dim() and len(t) == size else t for name, t in found.items()}


def judged(ours: Path, theirs: Path, good: str) -> dict[str, Any]:
    a, b = tensors(ours), tensors(theirs)
    if (theirs / "tokenizer.json").is_file() and (ours / "tokenizer.json").is_file():
        a = by_token(a, ours, theirs)
    if {n: (t.shape, t.dtype) for n, t in a.items()} != {n: (t.shape, t.dtype) for n, t in b.items()}:
        odd = [n for n in {*a, *b} if n not in a or n not in b or (a[n].shape, a[n].dtype) != (b[n].shape, b[n].dtype)]
        first = sorted(odd)[0]
        shown = [f"{tuple(t[first].shape)} {t[first].dtype}" if first in t else "none" for t in (a, b)]
        return {"outcome": "other tensors", "said": f"{len(odd)}, such as {first}: {' and '.join(shown)}"}
    largest, units = difference(a, b)
    same = largest <= TOLERANCE or units <= 1
    return {"outcome": good if same else "DIFFERENT", "largest": f"{largest:.1e}", "units": f"{units:.3g}"}


def examples(folder: Path) -> dict[str, str]:
    """mergekit's own recipes, with our models in the places of theirs and layers scaled to ours."""
    found = {}
    for file in sorted([*folder.glob("*.yml"), *folder.glob("*.yaml")]):
        stand_ins: dict[str, str] = {}

        def stand_in(value: Any, key: str = "", seen: dict[str, str] = stand_ins) -> Any:
            if isinstance(value, dict):
                return {k: stand_in(v, k, seen) for k, v in value.items()}
            if isinstance(value, list):
                if key == "layer_range":
                    return [v // 10 for v in value]
                return [stand_in(v, "", seen) for v in value]
            if key in ("model", "base_model"):
                return seen.setdefault(value, ("a", "b", "c", "base")[len(seen) % 4])
            return value

        found[f"examples/{file.name}"] = yaml.safe_dump(stand_in(yaml.safe_load(file.read_text())))
    return found


def every_recipe(folder: Path | None) -> dict[str, str]:
    """Name -> YAML; `folder`: mergekit's examples."""
    found = {name: yaml.safe_dump(recipe) for name, recipe in RECIPES.items()}
    found |= {name: yaml.safe_dump_all(stages) for name, stages in STAGES.items()}
    for dtype in ("float16", "bfloat16"):
        found |= {
            f"{name} {dtype}": yaml.safe_dump({**RECIPES[name], "dtype": dtype})
            for name in ("linear", "ties", "della", "nuslerp base", "sce", "ram")
        }
    return found | (examples(folder) if folder else {})


def rows_of(recipes: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """All of them compared, in a folder where nothing else lies."""
    make_models(work)
    make_models_of_parts(work)
    rows = []
    for name, text in recipes.items():
        began = time.perf_counter()
        rows.append(compare(name, text, work))
        print(*rows[-1].values(), f"{time.perf_counter() - began:.1f} s", sep="  ", flush=True)
    return rows


def written(rows: list[dict[str, Any]], table: Path) -> None:
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def is_decided(row: dict[str, Any]) -> bool:
    """Whether both give the same, or one of them refuses by name."""
    return row["outcome"] not in ("DIFFERENT", "other tensors")


def concluded(rows: list[dict[str, Any]], kind: str, table: Path | None) -> int:
    """Say what came of it, and keep it; the exit code."""
    decided = [r for r in rows if is_decided(r)]
    same = [r for r in rows if r["outcome"].startswith("same")]
    print(f"{len(rows)} {kind}: {len(decided)} decided, {len(same)} the same")
    if table is not None:
        written(rows, table)
    return 0 if len(decided) == len(rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--examples", type=Path, help="mergekit's examples folder")
    chosen = parser.parse_args()
    every = {n: text for n, text in every_recipe(chosen.examples).items() if fnmatch.fnmatch(n, chosen.pattern)}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows = rows_of(every, Path(folder))
    return concluded(rows, "recipes", TABLE if chosen.pattern == "*" else None)


if __name__ == "__main__":
    sys.exit(main())
