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
import atexit
import contextlib
import copy
import csv
import fnmatch
import io
import json
import math
import os
import shutil
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
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TABLE = Path(__file__).parent / "tables" / "mergekit_parity.csv"
TOLERANCE = 1e-5
EXACT = "same as in float64"
"""What becomes of recipes where mergekit's own arithmetic is the difference."""
TIED = "same but for equal magnitudes at the cut"
"""The same in float64, where mergekit keeps all that ties with the smallest that it keeps."""


def models(*names: str, **parameters: list[Any]) -> list[dict[str, Any]]:
    """Entries of a recipe, with one value of each parameter per model."""
    entries = []
    for i, name in enumerate(names):
        own = {key: values[i] for key, values in parameters.items()}
        entries.append({"model": name, **({"parameters": own} if own else {})})
    return entries


THREE = ("a", "b", "c")
PLACES = ("base", *THREE, "base-t", "a-t", "b-t", "a-lora")
FOLDERS = ("t5/", "whisper/", "qwen2_vl/", "mistral3/")
WEIGHT = [0.4, 0.9, -0.3]
DENSITY = [0.5, 0.7, 0.3]


def task(method: str, everywhere: dict[str, Any] | None = None, **per_model: list[Any]) -> dict[str, Any]:
    """A recipe that merges the task vectors of three fine-tunes."""
    recipe = {"merge_method": method, "base_model": "base", "models": models(*THREE, **per_model), "dtype": "float32"}
    return {**recipe, **({"parameters": everywhere} if everywhere else {})}


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": models(*THREE, weight=[1.0, 0.3, 0.5])},
    "linear normalize false": {
        "merge_method": "linear", "models": models(*THREE, weight=WEIGHT), "parameters": {"normalize": False},
    },
    "slerp": {"merge_method": "slerp", "base_model": "a", "models": models("a", "b"), "parameters": {"t": 0.3}},
    "slerp gradient": {
        "merge_method": "slerp", "base_model": "a", "models": models("a", "b"),
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.2}]},
    },
    "task_arithmetic": task("task_arithmetic", {"lambda": 0.8}, weight=WEIGHT),
    "task_arithmetic normalize": task("task_arithmetic", {"normalize": True, "density": 0.5}, weight=WEIGHT),
    "ties": task("ties", weight=WEIGHT, density=DENSITY),
    "ties normalize false": task("ties", {"normalize": False, "int8_mask": True}, weight=WEIGHT, density=DENSITY),
    "ties rescale": task("ties", {"rescale": True}, weight=WEIGHT, density=DENSITY),
    "dare_linear": task("dare_linear", weight=WEIGHT, density=DENSITY),
    "dare_linear rescale false": task(
        "dare_linear", {"rescale": False, "normalize": True}, weight=WEIGHT, density=DENSITY
    ),
    "dare_ties": task("dare_ties", weight=WEIGHT, density=DENSITY),
    "dare_ties normalize": task("dare_ties", {"normalize": True, "lambda": 0.6}, weight=WEIGHT, density=DENSITY),
    "della": task("della", weight=WEIGHT, density=DENSITY, epsilon=[0.1, 0.2, 0.15]),
    "della rescale false": task("della", {"rescale": False, "normalize": False}, weight=WEIGHT, density=DENSITY),
    "della_linear": task("della_linear", weight=WEIGHT, density=DENSITY),
    "breadcrumbs": task("breadcrumbs", weight=WEIGHT, density=DENSITY, gamma=[0.1, 0.05, 0.2]),
    "breadcrumbs default gamma": task(
        "breadcrumbs", {"normalize": True, "rescale": True}, weight=WEIGHT, density=DENSITY
    ),
    "breadcrumbs_ties": task("breadcrumbs_ties", weight=WEIGHT, density=DENSITY, gamma=[0.1, 0.05, 0.2]),
    "model_stock": task("model_stock"),
    "model_stock filter_wise": task("model_stock", {"filter_wise": True}),
    "sce": task("sce", {"select_topk": 0.4}),
    "sce default": task("sce", {"int8_mask": True}),
    "ram": task("ram"),
    "ram epsilon": task("ram", {"epsilon": 0.01}),
    "ramplus_tl": task("ramplus_tl", {"epsilon": 0.02, "r": 0.3, "alpha": 0.5}),
    "karcher": {"merge_method": "karcher", "models": models(*THREE)},
    "nuslerp": {"merge_method": "nuslerp", "models": models("a", "b", weight=[0.7, 0.6])},
    "nuslerp base": {"merge_method": "nuslerp", "base_model": "base", "models": models("a", "b", weight=[0.7, 0.6])},
    "nuslerp rows": {
        "merge_method": "nuslerp", "base_model": "base", "models": models("a", "b", weight=[0.2, 0.6]),
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp row_wise": {
        "merge_method": "nuslerp", "models": models("a", "b", weight=[0.2, 0.6]),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "models": models(*THREE, weight=[0.5, 0.3, 0.6])},
    "multislerp base": task("multislerp", {"normalize_weights": False}, weight=[0.5, 0.3, 0.6]),
    "nearswap": {"merge_method": "nearswap", "base_model": "a", "models": models("a", "b"), "parameters": {"t": 0.01}},
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "a", "models": models("b")},
    "one model and a base": {**task("task_arithmetic", {"lambda": 0.5}), "models": models("a", weight=[1.0])},
    "slices: frankenmerge": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3]}]},
            {"sources": [{"model": "b", "layer_range": [1, 4]}]},
        ],
    },
    "slices: scaled copies": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "a", "layer_range": [1, 3],
                        "parameters": {
                            "scale": [
                                {"filter": "o_proj", "value": 0.0},
                                {"filter": "down_proj", "value": 0.0},
                                {"value": 1.0},
                            ]
                        },
                    }
                ]
            },
        ],
    },
    "slices: slerp with gradients": {
        "merge_method": "slerp", "base_model": "a", "parameters": {"t": [0.1, 0.9]},
        "slices": [
            {
                "sources": [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [1, 4]}],
                "parameters": {"t": [{"filter": "mlp", "value": [0.0, 1.0]}]},
            },
            {
                "base_model": "c",
                "sources": [{"model": "b", "layer_range": [0, 2]}, {"model": "c", "layer_range": [2, 4]}],
            },
        ],
    },
    "slices: ties": {
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 0.3},
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2]},
                    {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0.2, 0.8]}},
                    {"model": "b", "layer_range": [2, 4]},
                ]
            },
        ],
    },
    "modules: default": {
        "merge_method": "linear", "modules": {"default": {"models": models("a", "b", weight=[1.0, 2.0])}},
    },
    "modules: default, slices": {
        "merge_method": "passthrough",
        "modules": {"default": {"slices": [{"sources": [{"model": m, "layer_range": [1, 3]}]} for m in "ab"]}},
    },
    "passthrough scale": {"merge_method": "passthrough", "models": models("a", scale=[0.5])},
}  # fmt: skip


WORDS = {
    "base-t": ([f"w{i}" for i in range(70)], ["<both>"]),
    "a-t": ([f"w{i}" for i in range(60)] + ["left"], ["<x>", "<both>"]),
    "b-t": (
        ["w0", "right"] + [f"w{i}" for i in range(69, 20, -1)] + [f"w{i}" for i in range(70, 90)],
        ["<both>", "<y>"],
    ),
}
"""Models with tokens of their own: those of the tokenizer, and added ones. Rows beyond them are padding."""
OWN_TEMPLATES = {"a-t": "{{ messages[0].content }} a", "b-t": "{{ messages[0].content }} a\n"}
CONVERSATIONS = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("user", "Hello")],
        [("system", "Be brief."), ("user", " Hello \n")],
        [("system", " Be brief.\n"), ("user", "Hello"), ("assistant", "  Good day."), ("user", "How are\nyou? ")],
        [("user", "One"), ("assistant", "two "), ("user", "three"), ("assistant", "four\n")],
        [("system", "First"), ("user", "x"), ("assistant", "y"), ("system", "Second"), ("user", "")],
        [("user_context", "A text"), ("user", "Shorten it")],
        [("assistant", "I begin"), ("user", "Then I go on")],
        [("user", "two"), ("user", "in a row")],
        [("tool", "{}"), ("user", "Now?")],
    )
]
"""What both tools' templates are asked to render, with the answer to come and without."""
ROWS = {"base-t": 80, "a-t": 63, "b-t": 73}
PAIR = {"merge_method": "linear", "base_model": "a-t", "models": models("a-t", "b-t", weight=[0.3, 0.7])}
TASK = {"merge_method": "task_arithmetic", "base_model": "base-t", "models": models("a-t", "b-t", weight=[0.6, 0.3])}
SINGLE = {
    "left": {"source": {"kind": "model_token", "model": "b-t", "token": "right"}},
    "w30": {"source": "b-t", "force": True},
    "w31": {"source": {"kind": "model_token", "model": "a-t", "token": "w5"}, "force": True},
    "w32": {"source": {"kind": "model_token", "model": "b-t", "token_id": 4}, "force": True},
    "w33": {"source": {"kind": "zero"}, "force": True},
    "w34": {"source": "a-t"},
    "<new>": {"source": {"kind": "zero"}},
    "<copy>": {"source": {"kind": "model_token", "model": "a-t", "token": "<x>"}},
}
RECIPES |= {
    "tokens: union": {**PAIR, "tokenizer_source": "union"},
    "tokens: union and a base": {**TASK, "tokenizer_source": "union"},
    "tokens: those of the base": {**TASK, "tokenizer_source": "base"},
    "tokens: those of a model": {**TASK, "tokenizer": {"source": "b-t"}},
    "tokens: ties, union": {
        **TASK, "merge_method": "ties", "models": models("a-t", "b-t", weight=[1.0, 0.5], density=[0.5, 0.7]),
        "tokenizer_source": "union",
    },
    "tokens: slerp, union": {
        "merge_method": "slerp", "base_model": "a-t", "models": models("a-t", "b-t"), "parameters": {"t": 0.3},
        "tokenizer_source": "union",
    },
    "tokens: rows of single ones": {**PAIR, "tokenizer": {"source": "union", "tokens": SINGLE}},
    "tokens: rows of single ones and a base": {**TASK, "tokenizer": {"source": "union", "tokens": SINGLE}},
    "tokens: padded": {**PAIR, "tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "tokens: slices": {
        "merge_method": "linear", "tokenizer_source": "base", "base_model": "a-t", "parameters": {"weight": 0.5},
        "slices": [
            {"sources": [{"model": m, "layer_range": [i, i + 2]} for m in ("a-t", "b-t")]} for i in (0, 1, 2)
        ],
    },
    **{
        f"chat_template: {name}": {**PAIR, "tokenizer_source": "union", "chat_template": name}
        for name in ("alpaca", "chatml", "exaone", "llama3", "mistral", "{{ messages[0].content }}, {{ bos_token }}")
    },
    "chat_template: auto": {**TASK, "tokenizer_source": "base", "chat_template": "auto"},
    "chat_template: auto, none there": {**TASK, "models": models("a-t", weight=[0.5]), "chat_template": "auto"},
    "chat_template: unknown": {**PAIR, "tokenizer_source": "union", "chat_template": "vicuna"},
    "chat_template and no tokenizer_source": {
        "merge_method": "passthrough", "models": models("a-t"), "chat_template": "llama3",
    },
}  # fmt: skip


RECIPES["chat_template: auto, slices"] = {**RECIPES["tokens: slices"], "chat_template": "auto"}
SEVERAL = ("t5", "whisper", "qwen2_vl", "mistral3")
"""Kinds of models with several parts: base, a, b."""
PARTS = {
    "t5": ("encoder", "decoder", "shared"), "whisper": ("encoder", "decoder"),
    "qwen2_vl": ("text_decoder", "multi_modal_projector", "vision_tower"),
    "mistral3": ("text_decoder", "multi_modal_projector", "vision_tower"),
}  # fmt: skip


def modules(kind: str, method: str, weights: list[Any], **told: Any) -> dict[str, Any]:
    """A recipe with other weights for every part of a model."""
    of = [
        models(f"{kind}/a", f"{kind}/b", weight=[weights[i % len(weights)], weights[-1 - i % len(weights)]])
        for i in range(len(PARTS[kind]))
    ]
    return {"merge_method": method, "modules": {m: {"models": o} for m, o in zip(PARTS[kind], of, strict=True)}, **told}


TABLE_OF = {"model": {"path": "a"}, "lora": {"path": "a-lora"}}
RECIPES |= {
    "dtype and out_dtype": {**task("ties", weight=WEIGHT, density=DENSITY), "dtype": "float64", "out_dtype": "float16"},
    "dtype narrower than the models": {**RECIPES["linear"], "dtype": "float16", "out_dtype": "float32"},
    "dtype of each model another": {
        "merge_method": "linear", "models": models("float16/a", "bfloat16/b", weight=[0.5, 0.5]),
    },
    "dtype int64": {**RECIPES["linear"], "dtype": "int64"},
    "models by tables": {
        "merge_method": "slerp", "base_model": {"model": {"path": "a"}}, "parameters": {"t": {"value": "3e-1"}},
        "models": [{"model": {"model": "b"}}, {"model": {"model": {"path": "a", "revision": None}, "lora": None}}],
    },
    "model with lora": {"merge_method": "linear", "models": models("a+a-lora", "b", weight=[0.6, 0.4])},
    "model with lora, base_model": {**task("ties"), "models": [
        {"model": TABLE_OF, "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.4}},
    ], "parameters": {"density": 0.5}},
    "model with revision": {"merge_method": "linear", "models": models("tiny/hub@v1", "b", weight=[0.6, 0.4])},
    "model with revision, table": {
        "merge_method": "linear", "parameters": {"weight": 0.5},
        "models": [{"model": {"model": {"path": "tiny/hub", "revision": "v1"}}}, {"model": "b"}],
    },
    "override_architecture": {
        "merge_method": "linear", "parameters": {"weight": 0.5},
        "models": [{"model": {"model": "a", "override_architecture": "MistralForCausalLM"}}, {"model": "b"}],
    },
    "slices: residual_weight": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}], "residual_weight": 0.5}],
    },
    "gradient of switches": task("ties", {"rescale": [True, False]}, weight=WEIGHT, density=DENSITY),
    "conditions with *": task(
        "ties", {"density": [{"filter": "mlp", "value": [0.3, 0.9]}, {"filter": "*", "value": 0.6}]}, weight=WEIGHT
    ),
    "parameters at all places": {
        "merge_method": "ties", "base_model": "base", "parameters": {"weight": 0.3, "density": 0.9, "lambda": 0.5},
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2]},
                    {"model": "a", "layer_range": [0, 2], "parameters": {"weight": {"filter": "attn", "value": 1.0}}},
                    {"model": "b", "layer_range": [2, 4], "parameters": {"density": 0.4}},
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 0.8}], "lambda": [0.7, 0.9]},
            },
            {"sources": [{"model": m, "layer_range": [2, 4]} for m in ("base", "a", "b")], "base_model": "base"},
        ],
    },
    "parameter unknown": task("ties", {"wight": 1.0}, weight=WEIGHT, density=DENSITY),
    "parameter missing": task("ties", density=DENSITY),
    "merge_method unknown": {"merge_method": "tis", "models": models("a", "b", weight=[1, 1])},
    "models and slices": {**RECIPES["linear"], "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
    "tokenizer twice": {**PAIR, "tokenizer_source": "union", "tokenizer": {"source": "union"}},
    "tokens: source left out": {**PAIR, "tokenizer": {"source": "union", "tokens": {"w5": {"force": True}}}},
    **{
        f"{method}: {key} {value}": task(method, {key: value}, weight=WEIGHT, density=DENSITY)
        for method in (
            "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
            "task_arithmetic",
        )
        for key, value in (
            ("lambda", 0.7), ("normalize", True), ("rescale", True), ("rescale", False), ("int8_mask", True),
        )
    },
    "della_linear: epsilon": task("della_linear", weight=WEIGHT, density=DENSITY, epsilon=[0.1, 0.2, 0.15]),
    "karcher: max_iter, tol": {**RECIPES["karcher"], "parameters": {"max_iter": 3, "tol": 1e-3}},
    "multislerp: eps": {**RECIPES["multislerp"], "parameters": {"eps": 1e-3}},
    "model_stock: base among the models": {**task("model_stock"), "models": models("base", "a", "b")},
}  # fmt: skip
BOTH = models("t5/a", "t5/b")
RECIPES |= {
    **{f"modules: {kind}": modules(kind, "linear", [0.2, 0.9, [0.1, 0.6, 0.3]]) for kind in SEVERAL},
    "modules: task_arithmetic": modules("t5", "task_arithmetic", [0.3, [0.5, 1.0]], base_model="t5/base"),
    "modules: other models": {
        "merge_method": "passthrough",
        "modules": {m: {"models": models(f"t5/{x}")} for m, x in zip(PARTS["t5"], ("a", "b", "base"), strict=True)},
    },
    "modules: parameters of their own": {
        "merge_method": "slerp", "base_model": "t5/a", "parameters": {"t": 0.5},
        "modules": {
            "encoder": {"models": BOTH, "parameters": {"t": [0.0, 1.0]}},
            "decoder": {"models": BOTH, "parameters": {"t": [{"filter": "SelfAttention", "value": 0.9}]}},
            "shared": {"models": BOTH},
        },
    },
    "modules: some left out": {
        "merge_method": "linear", "parameters": {"weight": 1}, "modules": {"encoder": {"models": BOTH}},
    },
    "models with several parts": {
        "merge_method": "ties", "base_model": "t5/base",
        "models": models("t5/a", "t5/b", weight=[[0.2, 0.8], 0.5], density=[0.5, [0.3, 0.9]]),
    },
}  # fmt: skip
STAGES = {
    "stages": [
        {"name": "first", "merge_method": "linear", "models": models("a", "b", weight=[0.5, 0.5])},
        {
            "name": "second",
            "merge_method": "slerp",
            "base_model": "first",
            "models": models("c"),
            "parameters": {"t": 0.5},
        },
        task("dare_ties", weight=[0.5, 0.2, 0.4], density=[0.6, 0.8, 0.5]),
    ]
}
STAGES["stages"][2]["models"][0]["model"] = "second"


def make_models(folder: Path) -> None:
    """base, a, b, c: fine-tunes that differ from it by noise of several sizes."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    for seed, name in enumerate(("base", *THREE)):
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        for parameter in model.parameters():
            parameter.data += 0.02 * seed * torch.randn_like(parameter)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model.to(dtype).save_pretrained(folder / str(dtype).removeprefix("torch.") / name)
    make_adapter(folder / "float32")
    place_in_cache(folder / "float32" / "c")
    for seed, (name, (words, added)) in enumerate(WORDS.items()):
        torch.manual_seed(10 + seed)
        config.vocab_size = ROWS[name]
        place = folder / "float32" / name
        LlamaForCausalLM(config).save_pretrained(place)
        core = Tokenizer(WordLevel({t: i for i, t in enumerate(words)}, unk_token="w0"))
        core.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", bos_token="w30", eos_token="w31")
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.chat_template = OWN_TEMPLATES.get(name)
        tokenizer.save_pretrained(place)


def make_adapter(folder: Path) -> None:
    """A LoRA of rank 2 on a, with noise in both factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(20)
    targets = ["q_proj", "down_proj"]
    told = LoraConfig(r=2, lora_alpha=6, target_modules=targets, base_model_name_or_path=str(folder / "a"))
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "a"), told)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "a-lora")


def place_in_cache(model: Path) -> None:
    """As if ``tiny/hub@v1`` had been downloaded."""
    from huggingface_hub import constants

    repo = Path(constants.HF_HUB_CACHE) / "models--tiny--hub"
    commit = "0123456789abcdef0123456789abcdef01234567"
    atexit.register(shutil.rmtree, constants.HF_HUB_CACHE, ignore_errors=True)
    shutil.copytree(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)


def make_models_of_parts(folder: Path) -> None:
    """base, a, b of kinds with encoder and decoder, or with eyes."""
    import transformers as tr

    text: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    seeing = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    pixels = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "head_dim": 8,
    }  # fmt: skip
    made: dict[str, tuple[Any, Any]] = {
        "t5": (
            tr.T5ForConditionalGeneration,
            tr.T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
                tie_word_embeddings=False, feed_forward_proj="gated-gelu",
            ),
        ),
        "whisper": (
            tr.WhisperForConditionalGeneration,
            tr.WhisperConfig(
                vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            ),
        ),
        "qwen2_vl": (
            tr.Qwen2VLForConditionalGeneration,
            tr.Qwen2VLConfig(text_config={**text, **rope}, vision_config=seeing),
        ),
        "mistral3": (
            tr.Mistral3ForConditionalGeneration,
            tr.Mistral3Config(
                text_config={**text, "head_dim": 8, "model_type": "mistral"},
                vision_config={**pixels, "model_type": "pixtral"},
            ),
        ),
    }  # fmt: skip
    for kind, (network, config) in made.items():
        torch.manual_seed(0)
        model = network(config)
        for name in ("base", "a", "b"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(folder / "float32" / kind / name)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--examples", type=Path, help="mergekit's examples folder")
    chosen = parser.parse_args()
    every = {n: text for n, text in every_recipe(chosen.examples).items() if fnmatch.fnmatch(n, chosen.pattern)}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        rows = rows_of(every, Path(folder))
    decided = [r for r in rows if is_decided(r)]
    same = [r for r in rows if r["outcome"].startswith("same")]
    print(f"{len(rows)} recipes: {len(decided)} decided, {len(same)} the same")
    if chosen.pattern == "*":
        written(rows, TABLE)
    return 0 if len(decided) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
