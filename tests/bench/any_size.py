"""Memory and time of scramble, align, merge and plan on models of any size, from weights and with 64 texts.

    python tests/bench/any_size.py 0.3B --work /tmp/any-size

writes a random bf16 model of a Llama's layers, scrambles it, adds 10 % noise, and brings it back; then it solves the
average of the model and a noisy copy. What a step took goes to tables/any_size.csv. The yardstick is a bare loop: one
product of every tensor on each of its axes of neurons, n² d each. Steps that are in the table already are not done
again (`--again` does them).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import run

SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 500),
    "0.1B": (768, 2048, 12, 12, 4, 32_000),
    "0.3B": (1024, 2816, 20, 16, 8, 32_000),
    "1.2B": (2048, 8192, 18, 32, 8, 32_000),
    "8B": (4096, 14_336, 32, 32, 8, 128_256),
}
"""Hidden size, inner size, layers, heads, key-value heads, vocabulary."""
TABLE = Path(__file__).parent / "tables" / "any_size.csv"
STEPS = (
    "scramble", "loop", "align", "merge", "plan", "merge as planned", "plan with data", "merge with data", "predict",
    "solve with data",
)  # fmt: skip
SOLVE = ("--match", "never", "--repair", "solve")
NOISE = 0.1
MOST = {"0.3B": 900, "1.2B": 1800, "8B": 6144}
WITH_DATA, SOLVED, TIMES = 3072, 4096, 4
"""What is asked: MiB of anonymous memory from weights, with data, and solved; CPU time over the bare loop's."""


def tensors(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, i, layers, heads, kv, vocab = SHAPES[size]
    d = h // heads
    yield "model.embed_tokens.weight", (vocab, h)
    for k in range(layers):
        at = f"model.layers.{k}."
        yield at + "input_layernorm.weight", (h,)
        yield at + "self_attn.q_proj.weight", (h, h)
        yield at + "self_attn.k_proj.weight", (kv * d, h)
        yield at + "self_attn.v_proj.weight", (kv * d, h)
        yield at + "self_attn.o_proj.weight", (h, h)
        yield at + "post_attention_layernorm.weight", (h,)
        yield at + "mlp.gate_proj.weight", (i, h)
        yield at + "mlp.up_proj.weight", (i, h)
        yield at + "mlp.down_proj.weight", (h, i)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocab, h)


def write_model(folder: Path, size: str) -> None:
    """A random model, one shard per layer or so, without ever holding it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    h, i, layers, heads, kv, vocab = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": i,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    names: dict[str, int] = {}
    for name, shape in tensors(size):
        if sum(t.numel() for t in shards[-1].values()) > 1 << 28:
            _save(folder, shards, save_file)
            shards.append({})
        value = torch.randn(shape, generator=generator)
        shards[-1][name] = (1 + 0.1 * value if len(shape) == 1 else 0.02 * value).to(torch.bfloat16)
        names[name] = len(shards)
    _save(folder, shards, save_file)
    index = {"metadata": {}, "weight_map": {n: f"model-{k:05}.safetensors" for n, k in names.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save(folder: Path, shards: list, save_file) -> None:
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
    shards[-1] = {}


def write_texts(path: Path, vocabulary: int) -> None:
    """64 texts of 128 tokens."""
    import torch
    from safetensors.torch import save_file

    ids = torch.randint(3, vocabulary, (64, 128), generator=torch.Generator().manual_seed(2))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, path)


def add_noise(folder: Path) -> None:
    """10 % noise on every tensor, in the files."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    for file in sorted(folder.glob("*.safetensors")):
        state = load_file(file)
        for name, value in state.items():
            wide = value.float()
            noise = NOISE * wide.std() * torch.randn(wide.shape, generator=generator)
            state[name] = (wide + noise).to(value.dtype).contiguous()
        save_file(state, file, metadata={"format": "pt"})


def recovered(a: Path, b: Path) -> float:
    """Share of the rows and columns of all matrices that lie on their own place in A."""
    import torch
    from safetensors import safe_open

    hit = total = 0
    where = {n: folder / f for folder in (b,) for n, f in _files(folder).items()}
    for name, file in _files(a).items():
        with safe_open(a / file, "pt") as one, safe_open(where[name], "pt") as two:
            x, y = one.get_tensor(name), two.get_tensor(name)
        if x.dim() < 2:
            continue
        for dim in (0, 1):
            inner = (x * y).sum(1 - dim, dtype=torch.float32)
            norms = x.norm(dim=1 - dim, dtype=torch.float32) * y.norm(dim=1 - dim, dtype=torch.float32)
            cosine = inner / norms
            hit, total = hit + int((cosine > 0.8).sum()), total + len(cosine)
    return hit / total


def _files(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


LOOP = """
import sys, time, torch
sys.path.insert(0, {here!r})
from any_size import SHAPES, tensors
h, i, layers, heads, kv, vocab = SHAPES[{size!r}]
spent = 0.0
for name, shape in tensors({size!r}):
    for dim, n in enumerate(shape):
        if n == vocab:
            continue
        x = torch.randn(n, torch.Size(shape).numel() // n)
        y = torch.randn(x.shape)
        t = time.process_time()
        x @ y.T
        spent += time.process_time() - t
print("SPENT", spent)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", nargs="*", default=list(STEPS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    given = parser.parse_args()
    work = given.work / given.size
    rows = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    done = {(r["model"], r["step"]) for r in rows}
    a, b, near, out = work / "a", work / "b", work / "near", work / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    data, saved = work / "texts.safetensors", work / "plan.json"
    if not a.exists():
        write_model(a, given.size)
    write_texts(data, SHAPES[given.size][-1])
    for step in given.steps:
        if (given.size, step) in done and not given.again and not (step == "scramble" and not b.exists()):
            continue
        shutil.rmtree(out, ignore_errors=True)
        row = {"model": given.size, "step": step}
        if step == "loop":
            code = LOOP.format(here=str(Path(__file__).parent), size=given.size)
            said = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            row["cpu_seconds"] = f"{float(said.stdout.split()[-1]):.1f}"
        else:
            verb = {
                "scramble": ["scramble", a, "-o", b, "--seed", "7"],
                "align": ["align", b, "--to", a, "-o", out, "--match", "always"],
                "merge": ["merge", a, b, "-o", out, "--match", "always"],
                "plan": ["plan", a, b, "-o", saved],
                "merge as planned": ["merge", a, b, "-o", out, "--plan", saved],
                "plan with data": ["plan", a, b, "--data", data],
                "predict": ["predict", a, b, "--data", data],
                "merge with data": ["merge", a, b, "-o", out, "--data", data, "--force"],
                "solve with data": ["merge", a, near, "-o", out, "--data", data, "--force", *SOLVE],
            }[step]
            if step == "scramble":
                shutil.rmtree(b, ignore_errors=True)
            if step.startswith("solve") and not near.exists():
                shutil.copytree(a, near)
                add_noise(near)
            command = [sys.executable, "-m", "mergeid", *map(str, verb)]
            used = run(command, environment=environment, log=work / f"{step}.log", interval=0.01)
            row |= {"cpu_seconds": f"{used.cpu:.1f}", "anonymous_MiB": f"{used.anonymous / 2**20:.0f}"}
            if step == "scramble":
                add_noise(b)
            if out.exists():
                row["recovered"] = f"{recovered(a, out):.6f}"
        print(row, flush=True)
        rows = [r for r in rows if (r["model"], r["step"]) != (given.size, step)] + [row]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["model", "step", "cpu_seconds", "anonymous_MiB", "recovered"], lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
    judge([r for r in rows if r["model"] == given.size])
    if not given.keep:
        shutil.rmtree(work)


def judge(rows: list[dict[str, str]]) -> None:
    """Print every step beside what is asked of it."""
    loop = next((float(r["cpu_seconds"]) for r in rows if r["step"] == "loop"), 0.0)
    for r in rows:
        if r["step"] == "loop":
            continue
        with_data = SOLVED if r["step"].startswith("solve") else WITH_DATA
        most = with_data if "data" in r["step"] or r["step"] == "predict" else MOST.get(r["model"])
        asked = "" if most is None else f" (asked: {most})"
        times = (
            f", {float(r['cpu_seconds']) / loop:.1f} of one product per axis (asked of align and merge: {TIMES})"
            if loop
            else ""
        )
        print(f"{r['model']:5} {r['step']:16} {r['anonymous_MiB']:>6} MiB{asked}, {r['cpu_seconds']} s{times}")


if __name__ == "__main__":
    main()
