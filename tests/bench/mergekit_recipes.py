"""The recipes that `mergekit_parity` runs through both tools; names of models are those of `mergekit_models`."""

from __future__ import annotations

from typing import Any


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
