"""Mixtures of experts by mergeid and by mergekit-moe 0.1.5, in one process: the same recipe, the same tiny models.

    python tests/bench/mergekit_moe_parity.py [PATTERN]

Needs an environment with mergekit 0.1.5 and mergeid. Makes a base and two fine-tunes of a small Llama, Mistral, Qwen2
and Qwen3 (random weights from a seed), runs every recipe below, and writes ``tables/mergekit_moe_parity.csv``: recipe,
what became of it, largest difference of a tensor (absolute, and in units of the last place of its largest element).

Tensors are compared as transformers loads them: the two write the experts under other names. (DeepSeek's mixture needs
code from the hub; its files have the same names and are compared as they lie.) Random routers need no help: the same
seed gives both the same numbers. Noise is drawn from one list of numbers in both. What may differ:

- mergekit runs the base in bfloat16 for hidden states, mergeid in float32. mergekit then runs again in float32;
- mergekit's mean of hidden states counts the padding before shorter prompts, mergeid's does not. mergekit then runs a
  third time, one prompt at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from mergekit_parity import EXACT, TOLERANCE, concluded, difference, tensors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TABLE = Path(__file__).parent / "tables" / "mergekit_moe_parity.csv"
ALONE = "same but for padding in means"
SEED = 7
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
PROMPTS = [["w4 w5 w6 w7", "w8 w9 w10"], ["w30 w31 w32", "w40"], ["w50 w51 w52 w53 w54"]]


def mixture(
    dense: str, mode: str, *, expert: dict[str, Any] | None = None, shared: dict[str, Any] | None = None, **told: Any
) -> dict[str, Any]:
    """A recipe with two experts; `expert`: what is said of the second one besides, `shared`: of a shared one."""
    experts: list[dict[str, Any]] = [
        {"source_model": f"{dense}/{name}", "positive_prompts": prompts}
        for name, prompts in zip("ab", PROMPTS, strict=False)
    ]
    experts[1] |= expert or {}
    recipe = {"base_model": f"{dense}/base", "gate_mode": mode, "experts": experts, **told}
    return recipe if shared is None else {**recipe, "shared_experts": [{"source_model": f"{dense}/a", **shared}]}


PROMPTED = {"positive_prompts": PROMPTS[2]}
RECIPES: dict[str, dict[str, Any]] = {
    **{
        f"{dense} {mode}": mixture(dense, mode, **more)
        for dense, more in (("llama", {}), ("mistral", {}), ("qwen2", {"shared": PROMPTED}), ("qwen3", {}))
        for mode in ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
    },
    "negative prompts": mixture("llama", "cheap_embed", expert={"negative_prompts": PROMPTS[2]}),
    "negative prompts, hidden": mixture("mistral", "hidden", expert={"negative_prompts": PROMPTS[2]}),
    "residual_scale": mixture("llama", "cheap_embed", expert={"residual_scale": 0.4}),
    "noise_scale": mixture("llama", "cheap_embed", expert={"noise_scale": 0.1, "residual_scale": 0.5}),
    "experts_per_token": mixture("llama", "cheap_embed", experts_per_token=1),
    "dtype float16": mixture("llama", "cheap_embed", dtype="float16"),
    "dtype bfloat16": mixture("qwen3", "random", dtype="bfloat16"),
    "deepseek": mixture("llama", "cheap_embed", architecture="deepseek"),
    "deepseek, shared_experts": mixture("mistral", "hidden", shared={"residual_scale": 0.3}, architecture="deepseek"),
    "shared_experts without prompts": mixture("llama", "random", shared={}),
    "qwen of llama": mixture("llama", "cheap_embed", shared=PROMPTED, architecture="qwen"),
    "qwen of mistral, hidden": mixture("mistral", "hidden", shared=PROMPTED, architecture="Qwen MoE"),
    "shared_experts with noise": mixture("qwen2", "cheap_embed", shared={**PROMPTED, "noise_scale": 0.05}),
    "shared_experts: none for qwen2": mixture("qwen2", "cheap_embed"),
    "shared_experts: prompts for deepseek": mixture("llama", "hidden", shared=PROMPTED, architecture="deepseek"),
    "shared_experts: none in mixtral": mixture("llama", "random", shared={}, architecture="mixtral"),
    "architecture unknown": mixture("llama", "random", architecture="switch"),
    "architecture of other models": mixture("qwen2", "random", architecture="mixtral"),
    "prompts missing": mixture("llama", "hidden", expert={"positive_prompts": []}),
    "prompts all the same": mixture("llama", "hidden", expert={"positive_prompts": PROMPTS[0]}),
    "experts_per_token too many": mixture("llama", "random", experts_per_token=3),
}  # fmt: skip


def make_models(work: Path) -> None:
    """base, a, b of each kind, each with a tokenizer of words."""
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", bos_token="w1", eos_token="w2")
    for dense in ("llama", "mistral", "qwen2", "qwen3"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(dense, **SIZES))
        for name in ("base", "a", "b"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(work / dense / name)
            tokenizer.save_pretrained(work / dense / name)


@contextlib.contextmanager
def same_noise() -> Iterator[None]:
    """The same normal numbers for all tensors of a shape, in both tools."""
    from mergeid.methods.settings import MergeSettings

    def generator(*_: Any) -> torch.Generator:
        return torch.Generator().manual_seed(5)

    def randn_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator(), dtype=torch.float32)

    with mock.patch.object(MergeSettings, "generator", generator), mock.patch("torch.randn_like", randn_like):
        yield


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """mergekit's base in float32."""
    load = AutoModelForCausalLM.from_pretrained

    def wide(*words: Any, torch_dtype: Any = None, **told: Any) -> Any:
        return load(*words, dtype=torch.float32, **told)

    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained", wide):
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """mergekit's prompts one at a time, without padding."""
    import mergekit.moe.router as router

    states, tokenize = router.get_hidden_states, router.tokenize_prompts

    def each(model: Any, tokenized: Any, average: bool = True) -> Any:
        return torch.stack([states(model, one, average) for one in tokenized]).mean(0)

    def apart(prompts: list[str], tokenizer: Any) -> Any:
        return [tokenize([prompt], tokenizer) for prompt in prompts]

    with (
        in_float32(),
        mock.patch.object(router, "get_hidden_states", each),
        mock.patch.object(router, "tokenize_prompts", apart),
    ):
        yield


def by_mergekit(recipe: Path, out: Path, *more: str) -> str:
    """What mergekit-moe says where it fails; empty: it wrote `out`."""
    from click.testing import CliRunner
    from mergekit.scripts.moe import main

    words = [str(recipe), str(out), "--quiet", "--no-write-model-card", "--random-seed", str(SEED), "--device", "cpu"]
    with mock.patch("torch.set_num_interop_threads", lambda _: None):  # works once per process
        done = CliRunner().invoke(main, [*words, *more])
    return "" if done.exit_code == 0 else repr(done.exception or done.output[-200:])


def by_mergeid(recipe: Path, out: Path, *more: str) -> str:
    """The sentence with which mergeid refuses; empty: it wrote `out`."""
    from mergeid.commands.cli import run

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run(["moe", str(recipe), "-o", str(out), "--match", "never", "--seed", str(SEED), *more])
    return "" if not code else " ".join(told.getvalue().split()).removeprefix("mergeid: error: ")


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """As transformers has them."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "deepseek":
        return tensors(folder)
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    return found


def judged(ours: Path, theirs: Path, good: str) -> dict[str, Any]:
    a, b = loaded(ours), loaded(theirs)
    if {n: (t.shape, t.dtype) for n, t in a.items()} != {n: (t.shape, t.dtype) for n, t in b.items()}:
        odd = sorted({*a} ^ {*b}) or [n for n in a if (a[n].shape, a[n].dtype) != (b[n].shape, b[n].dtype)]
        return {"outcome": "other tensors", "said": f"{len(odd)}, such as {odd[0]}"}
    largest, units = difference(a, b)
    same = largest <= TOLERANCE or units <= 1
    return {"outcome": good if same else "DIFFERENT", "largest": f"{largest:.1e}", "units": f"{units:.3g}"}


def compare(name: str, recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    """One row of the table."""
    file = work / f"{name.replace(' ', '_').replace(':', '').replace(',', '')}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    ours, theirs = file.with_suffix(".ours"), file.with_suffix(".theirs")
    with same_noise():
        refused, failed = by_mergeid(file, ours), by_mergekit(file, theirs)
    row = {"recipe": name, "outcome": "", "largest": "", "units": "", "said": ""}
    if refused or failed:
        both = "refused by both" if refused and failed else "refused" if refused else "mergekit fails"
        return {**row, "outcome": both, "said": (refused or failed).replace(f"{work}/", "")[:300]}
    row |= judged(ours, theirs, "same")
    for outcome, how in ((EXACT.replace("float64", "float32"), in_float32), (ALONE, alone)):
        if row["outcome"] != "DIFFERENT":
            break
        out = file.with_suffix(f".{how.__name__}")
        with same_noise(), how():
            failed = by_mergekit(file, out)
        found = {"said": failed} if failed else judged(ours, out, outcome)
        if found.get("outcome") == outcome:
            row |= {**found, "said": f"as it runs mergekit is off by {row['largest']}"}
    return row


def rows_of(recipes: dict[str, dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """All of them compared, in that folder."""
    make_models(work)
    rows = []
    for name, recipe in recipes.items():
        rows.append(compare(name, recipe, work))
        print(*rows[-1].values(), sep="  ", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows = rows_of({n: r for n, r in RECIPES.items() if fnmatch.fnmatch(n, chosen.pattern)}, Path(folder))
    return concluded(rows, "mixtures", TABLE if chosen.pattern == "*" else None)


if __name__ == "__main__":
    sys.exit(main())
