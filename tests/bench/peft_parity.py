"""PEFT's `add_weighted_adapter` beside mergeid, in one run: the largest difference of the updates, for every way that
works on the products BA. `python tests/bench/peft_parity.py` writes tables/peft_parity.csv.

PEFT's `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` work on the factors A and B apart, which is
another thing: (A + A')(B + B') has cross terms. They are listed with their distance from the sum of the products.
Random masks of PEFT are those that mergeid draws.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import mergeid
from mergeid.io.opening import open_checkpoint
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MethodRequest
from mergeid.methods.sparse import Uniform

TABLE = Path(__file__).parent / "tables" / "peft_parity.csv"
RANK, DENSITY = 5, 0.5
WAYS: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "cat": ("task_arithmetic", [0.6, 0.4], {}),
    "svd": ("task_arithmetic", [0.6, 0.4], {}),
    "ties_svd": ("ties", [1.0, 1.0], {"density": DENSITY}),
    "magnitude_prune_svd": ("breadcrumbs", [0.6, 0.4], {"density": DENSITY, "gamma": 0.0}),
    "dare_linear_svd": ("dare_linear", [0.6, 0.4], {"density": DENSITY}),
    "dare_ties_svd": ("dare_ties", [1.0, 1.0], {"density": DENSITY}),
}
"""PEFT's name -> mergeid's method, weights and parameters; all but `cat` are then cut to a rank (`mergeid extract`)."""
APART = ("linear",)
"""On the factors apart."""


def prepared(folder: Path) -> list[Path]:
    """A base and two adapters of the same rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **sizes)).save_pretrained(folder / "base")
    for i, name in enumerate(("one", "two")):
        origin = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        tuned = get_peft_model(origin, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
        torch.manual_seed(1 + i)
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.data += 0.2 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / name)
    return [folder / n for n in ("base", "one", "two")]


def by_peft(paths: list[Path], way: str, weights: list[float]) -> dict[str, Tensor]:
    """Name of a weight -> its update."""
    base, one, two = paths
    loaded = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), one, adapter_name="one")
    loaded.load_adapter(two, adapter_name="two")
    told: dict[str, Any] = {} if way in ("cat", "linear") else {"svd_rank": RANK}
    told |= {} if way in ("cat", "svd", "linear") else {"density": DENSITY}
    with _our_masks(loaded, len(weights)):
        loaded.add_weighted_adapter(["one", "two"], weights, "merged", combination_type=way, **told)
    layers = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    return {f"{n}.weight": m.get_delta_weight("merged").detach() for n, m in layers.items()}


@contextmanager
def _our_masks(loaded: PeftModel, count: int) -> Iterator[None]:
    """PEFT drops what mergeid drops: it asks tensor by tensor, model by model."""
    layers = [n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "get_delta_weight")]
    asked = iter([(f"{n}.weight", i) for n in layers for i in range(count)])
    settings = MethodRequest(get_method("dare_linear")).over(count, [f"{n}.weight" for n in layers])
    generators: dict[str, torch.Generator] = {}

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        name, _ = next(asked)
        numbers = Uniform(generators.setdefault(name, settings.generator(name)))
        mask = (numbers.begin()(tensor.numel()) < density).reshape(tensor.shape)
        return tensor * mask / (density if rescale else 1)

    with patch("peft.utils.merge_utils.random_pruning", pruned):
        yield


def by_mergeid(paths: list[Path], way: str, folder: Path) -> dict[str, Tensor]:
    """The same, through files."""
    base, one, two = paths
    method, weights, parameters = WAYS[way]
    out = folder / f"merged_{way}"
    mergeid.merge(
        str(one), str(two), base=base, method=method, weights=weights, parameters=parameters, output=out, force=True
    )
    if way != "cat":
        mergeid.extract(out, base=base, output=folder / f"low_{way}", rank=RANK)
    made, origin = open_checkpoint(str(out if way == "cat" else folder / f"low_{way}")), open_checkpoint(base)
    return {n: made.tensor(n).double() - origin.tensor(n).double() for n in origin.table}


def difference(paths: list[Path], way: str, folder: Path) -> tuple[float, float]:
    """Largest difference of the updates, and the largest update, over all tensors."""
    theirs, ours = by_peft(paths, way, WAYS[way][1]), by_mergeid(paths, way, folder)
    rest = max(float(t.abs().max()) for n, t in ours.items() if n not in theirs)
    most = max(float((t.double() - ours[n]).abs().max()) for n, t in theirs.items())
    return max(most, rest), max(float(t.abs().max()) for t in theirs.values())


def apart(paths: list[Path], way: str) -> tuple[float, float]:
    """How far PEFT's way on the factors is from the sum of the products."""
    theirs, sums = by_peft(paths, way, WAYS["cat"][1]), by_peft(paths, "cat", WAYS["cat"][1])
    most = max(float((t - sums[n]).abs().max()) for n, t in theirs.items())
    return most, max(float(t.abs().max()) for t in sums.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as name, TABLE.open("w", newline="") as file:
        folder, writer = Path(name), csv.writer(file)
        paths = prepared(folder)
        writer.writerow(["peft", "mergeid", "largest difference", "largest update"])
        for way, (method, _, _) in WAYS.items():
            found = difference(paths, way, folder)
            writer.writerow([way, f"{method}, extract" if way != "cat" else method, *(f"{x:.2g}" for x in found)])
        for way in APART:
            writer.writerow([way, "none: on the factors apart", *(f"{x:.2g}" for x in apart(paths, way))])


if __name__ == "__main__":
    main()
