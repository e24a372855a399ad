"""Plain merges of Llama-type bf16 models of 0.1 to 3 billion parameters: CPU seconds and anonymous memory,
beside mergekit 0.1.5 in the same run.

    python tests/bench/merge_sizes.py --work FOLDER --mergekit-venv VENV [--size 1.2B] [--method ties …] [--csv FILE]

Weights are random (a base, and two models that differ from it by a twentieth of its spread). Each command is a process
of its own on one thread; its CPU seconds are the system's count, imports and hashes of the inputs included, and its
anonymous memory the highest RssAnon that was seen. Rows that the CSV has already are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measure import Usage, run

SIZES = {
    "0.1B": (32_000, 768, 2048, 12, 12, 4),
    "0.3B": (32_000, 1024, 4096, 16, 16, 4),
    "1.2B": (128_256, 2048, 8192, 16, 32, 8),
    "3B": (128_256, 3072, 8192, 28, 24, 8),
}
"""Vocabulary, width, width of the MLP, layers, heads, heads of keys and values."""
METHODS = {
    "linear": 0.45,
    "slerp": 0.7,
    "ties": 0.35,
    "dare_ties": 0.35,
    "task_arithmetic": 0.6,
    "model_stock": 0.6,
}
"""What is asked of the CPU seconds, as a share of mergekit's at 1.2B."""
MOST = 300 << 20
FIELDS = ("size", "method", "tool", "cpu_seconds", "wall_seconds", "anonymous_mib", "peak_mib")


def tensors(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, tied embeddings."""
    words, width, inner, layers, heads, groups = SIZES[size]
    narrow = width // heads * groups
    yield "model.embed_tokens.weight", (words, width)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (narrow, width)),
            ("self_attn.v_proj", (narrow, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (inner, width)),
            ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"{at}{name}.weight", shape
    yield "model.norm.weight", (width,)


def write_model(folder: Path, size: str, own: int, sparse: bool = False) -> Path:
    """A model folder, one tensor at a time; `own` 0 is the base. Sparse: zeros that take no room on the disk."""
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words, width, inner, layers, heads, groups = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": words, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": width // heads, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 2048, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    entries, at = {}, 0
    for name, shape in tensors(size):
        end = at + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if sparse:
            file.truncate(8 + len(header) + at)
        else:
            pool = np.random.default_rng(7).standard_normal(1 << 22, dtype=np.float32)
            for k, (_, shape) in enumerate(tensors(size)):
                for values in _values(shape, k, own, pool):
                    file.write(((values.view("<u4") + 0x8000) >> 16).astype("<u2").tobytes())
    (folder / "done").touch()
    return folder


def _values(shape: tuple[int, ...], k: int, own: int, pool: np.ndarray) -> Iterator[np.ndarray]:
    """One tensor in pieces: windows of the same normal numbers, which begin elsewhere for every tensor and piece."""
    left, piece = int(np.prod(shape)), 1 << 20
    places = np.random.default_rng(k)
    while left:
        count = min(left, piece)
        starts = places.integers(0, len(pool) - piece, 4)
        values = 0.02 * pool[starts[0] : starts[0] + count]
        if own:
            values = values + 0.001 * pool[starts[own] : starts[own] + count]
        yield values if len(shape) > 1 else values + 1
        left -= count


def recipe(method: str, models: list[Path], base: Path, output: Path) -> Path:
    """mergekit's configuration, with the parameters that mergeid is given too."""
    weight, density = ("weight: 0.5", "density: 0.5")
    own = {"ties": f"{weight}, {density}", "dare_ties": f"{weight}, {density}", "model_stock": "", "slerp": ""}
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    if method != "linear":
        lines.append(f"base_model: {models[0] if method == 'slerp' else base}")
    if method == "slerp":
        lines.append("parameters: {t: 0.5}")
    lines.append("models:")
    for model in models:
        told = own.get(method, weight)
        lines.append(f"  - {{model: {model}" + (f", parameters: {{{told}}}" if told else "") + "}")
    output.write_text("\n".join(lines) + "\n")
    return output


def commands(method: str, models: list[Path], base: Path, work: Path, mergekit: Path | None) -> dict[str, list[str]]:
    ours = [str(Path(sysconfig.get_path("scripts")) / "mergeid"), "merge", *map(str, models), "--match", "never"]
    ours += ["--method", method, "-o", str(work / "out")]
    if method not in ("linear", "slerp"):
        ours += ["--base", str(base)]
    if method in ("ties", "dare_ties", "task_arithmetic"):
        ours += ["--weights", "0.5,0.5"]
    if method in ("ties", "dare_ties"):
        ours += ["--density", "0.5"]
    found = {"mergeid": ours}
    if mergekit is not None:
        config = recipe(method, models, base, work / "recipe.yml")
        found["mergekit"] = [str(mergekit / "bin" / "mergekit-yaml"), str(config), str(work / "out"), "--quiet"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and outputs (12 GB)")
    parser.add_argument("--mergekit-venv", type=Path, help="environment that has mergekit; without: mergeid alone")
    parser.add_argument("--size", nargs="+", default=["0.3B", "1.2B"], choices=SIZES)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "tables" / "merge_sizes.csv")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(asked.csv.read_text().splitlines())) if asked.csv.exists() else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for size in asked.size:
        large = size == "3B"  # one model of random weights, the others of zeros: memory alone is looked at
        folders = [
            write_model(asked.work / f"{size}-{name}", size, own, sparse=large and own != 1)
            for own, name in enumerate(("base", "a", "b"))
        ]
        for method in asked.method:
            mergekit = None if large else asked.mergekit_venv
            for tool, command in commands(method, folders[1:], folders[0], asked.work, mergekit).items():
                if any((r["size"], r["method"], r["tool"]) == (size, method, tool) for r in rows):
                    continue
                shutil.rmtree(asked.work / "out", ignore_errors=True)
                used = run(command, environment=environment, log=asked.work / f"{tool}.log")
                rows.append(row(size, method, tool, used))
                print(*rows[-1].values(), flush=True)
                with open(asked.csv, "w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)
        if not asked.keep:
            for folder in folders:
                shutil.rmtree(folder)
    shutil.rmtree(asked.work / "out", ignore_errors=True)
    return 0 if judged(rows) else 1


def row(size: str, method: str, tool: str, used: Usage) -> dict[str, str]:
    numbers = f"{used.cpu:.1f}", f"{used.seconds:.1f}", f"{used.anonymous / 2**20:.0f}", f"{used.peak / 2**20:.0f}"
    return dict(zip(FIELDS, (size, method, tool, *numbers), strict=True))


def judged(rows: list[dict[str, str]]) -> bool:
    """Print the ratios; whether all that was measured is as asked."""
    found = {(r["size"], r["method"], r["tool"]): r for r in rows}
    held = True
    for (size, method, tool), ours in found.items():
        if tool != "mergeid":
            continue
        theirs = found.get((size, method, "mergekit"))
        small = int(ours["anonymous_mib"]) << 20 <= MOST
        share = float(ours["cpu_seconds"]) / float(theirs["cpu_seconds"]) if theirs else None
        fast = share is None or size != "1.2B" or share <= METHODS[method]
        held = held and small and fast
        told = "" if share is None else f"{share:.2f} of mergekit's CPU (asked at 1.2B: {METHODS[method]})"
        print(f"{size:5} {method:16} {ours['cpu_seconds']:>6} s {ours['anonymous_mib']:>5} MiB  {told}")
    return held


if __name__ == "__main__":
    sys.exit(main())
