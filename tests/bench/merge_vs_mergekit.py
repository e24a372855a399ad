"""Linear merge of two 200M-parameter bf16 Llama-type folders: mergeid beside mergekit 0.1.5, in one run.

    python tests/bench/merge_vs_mergekit.py

Makes both models (random weights from a seed, several shards), makes a virtual environment with mergekit (or uses the
one given), lets both tools merge alternately, checks that both outputs load in transformers and agree, and prints
a table. Exit code 1 where the targets are missed: wall time at most half of mergekit's, at most 600 MB of memory
beyond the mapped inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measure import Usage, run

MERGEKIT = "mergekit==0.1.5"
TARGET_RATIO, TARGET_BYTES = 0.5, 600_000_000
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
CONFIG = """
merge_method: linear
dtype: bfloat16
models:
  - {model: "%s", parameters: {weight: 0.5}}
  - {model: "%s", parameters: {weight: 0.5}}
"""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mergeid-bench"
    parser.add_argument("--work", type=Path, default=cache, help="folder for the models and outputs (2 GB)")
    parser.add_argument("--mergekit-venv", type=Path, help="environment that has mergekit (default: one in --work)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each tool, alternating")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def make_model(folder: Path, seed: int) -> Path:
    """One model in five shards, unless it is there already."""
    if not (folder / "done").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
        print(f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size="100MB")
        (folder / "done").touch()
    return folder


def mergekit_command(venv: Path) -> str:
    """Path of mergekit-yaml; installs it where the environment lacks it."""
    command = venv / "bin" / "mergekit-yaml"
    if not command.exists():
        print(f"installing {MERGEKIT} into {venv} (several GB, once)")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", MERGEKIT], check=True)
    return str(command)


def compare(first: Path, second: Path, models: list[Path]) -> dict[str, float]:
    """Load both outputs in transformers and hold them against each other and against the average in float64."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype="auto").state_dict() for f in (first, second))
    a, b = ({k: v for s in sorted(m.glob("*.safetensors")) for k, v in load_file(s).items()} for m in models)
    if set(ours) != set(theirs) or set(ours) != set(a):
        raise RuntimeError("the outputs have different tensors")
    exact = equal = elements = 0
    worst = 0.0
    for name, tensor in ours.items():
        x, y = a[name].double(), b[name].double()
        exact += int((tensor == ((x + y) / 2).to(torch.bfloat16)).sum())
        equal += int((tensor == theirs[name]).sum())
        elements += tensor.numel()
        # Units in the last place of a number as large as the larger of the two inputs.
        unit = torch.maximum(x.abs(), y.abs()).clamp_min(1e-30) * torch.finfo(torch.bfloat16).eps
        worst = max(worst, float(((tensor.double() - theirs[name].double()).abs() / unit).max()))
    return {"exact": exact / elements, "equal": equal / elements, "worst_ulp": worst}


def summary(usages: list[Usage]) -> Usage:
    """Median time, highest memory."""
    return Usage(
        statistics.median(u.seconds for u in usages),
        max(u.peak for u in usages),
        max(u.anonymous for u in usages),
        max(u.beyond_inputs for u in usages),
    )


def main() -> int:
    chosen = options()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    models = [make_model(work / name, seed) for seed, name in enumerate(("a", "b"))]
    shards = [path for model in models for path in sorted(model.glob("*.safetensors"))]
    config = work / "linear.yml"
    config.write_text(CONFIG % tuple(models))
    outputs = {"mergekit": work / "out-mergekit", "mergeid": work / "out-mergeid"}
    mergekit = mergekit_command(chosen.mergekit_venv or work / "venv")
    mergeid = str(Path(sysconfig.get_path("scripts")) / "mergeid")
    tail = ["-o", str(outputs["mergeid"]), "--match", "never"]
    commands = {
        "mergekit": [mergekit, str(config), str(outputs["mergekit"]), "--out-shard-size", "50M", "--quiet"],
        "mergeid": [mergeid, "merge", *map(str, models), *tail],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    usages: dict[str, list[Usage]] = {tool: [] for tool in commands}
    for k in range(chosen.runs + 1):  # the last round watches the mappings, and its time does not count
        for tool, command in commands.items():
            shutil.rmtree(outputs[tool], ignore_errors=True)
            watched = shards if k == chosen.runs else []
            usage = run(command, environment=environment, log=work / f"{tool}.log", inputs=watched)
            usages[tool].append(usage)
            print(
                f"{tool:9} {'memory' if watched else 'timed '}  {usage.seconds:6.2f} s  peak {usage.peak / 1e6:5.0f} MB"
            )
    table = {}
    for tool, found in usages.items():
        table[tool] = summary(found[:-1])
        table[tool].beyond_inputs = found[-1].beyond_inputs
    agreement = compare(outputs["mergeid"], outputs["mergekit"], models)
    ours, theirs = table["mergeid"], table["mergekit"]
    print(f"\n{'':34}{'mergeid':>10}{'mergekit':>10}{'ratio':>8}")
    for label, field, scale in (
        ("wall time, median (s)", "seconds", 1.0),
        ("peak resident, all (MB)", "peak", 1e6),
        ("peak not backed by a file (MB)", "anonymous", 1e6),
        ("peak beyond the mapped inputs (MB)", "beyond_inputs", 1e6),
    ):
        x, y = getattr(ours, field) / scale, getattr(theirs, field) / scale
        print(
            f"{label:34}{x:10.2f}{y:10.2f}{x / y:8.2f}" if scale == 1 else f"{label:34}{x:10.0f}{y:10.0f}{x / y:8.2f}"
        )
    print(
        f"\nBoth outputs load in transformers. mergeid equals the exactly rounded average in {agreement['exact']:.2%} "
        f"of the numbers\nand mergekit's output in {agreement['equal']:.2%}; the largest difference is "
        f"{agreement['worst_ulp']:.2f} bf16 units in the last place of the larger input."
    )
    if chosen.json:
        figures = {tool: vars(usage) for tool, usage in table.items()}
        chosen.json.write_text(json.dumps({**figures, "agreement": agreement}, indent=1) + "\n")
    met = ours.seconds <= TARGET_RATIO * theirs.seconds and ours.beyond_inputs <= TARGET_BYTES
    print("targets met" if met else "targets MISSED: at most half of mergekit's time, at most 600 MB beyond the inputs")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
