"""What a GPU does with networks of some size: time, memory and figures, step by step.

    python tests/bench/gpu_sizes.py --out FOLDER [--device cuda] [--size full] [--limit 240] [STEP …]

bf16      small Llama and BERT, files and live modules in bf16: which number formats plan and merge with data run in,
          and whether they say what the CPU says
barrier   with 1,000 examples, beside the CPU's
auto      `--device auto` takes the GPU
resnet50  seconds of solving over those of both models' forward passes
resnet18  two networks trained on Fashion-MNIST: accuracy of their merges
models    writes a Llama of 1.2 billion parameters, and a scrambled copy with noise
merge, solved, predict, plan
          these two with 64 texts of 128 tokens through the command line; `solved` is `merge --repair solve`

Every step runs in a process of its own, which is stopped after `--limit` seconds. Rows go to FOLDER/gpu_sizes.csv as
they come, and a step that has ended is not done again. Once `models` has ended, several runs may go on side by side,
each with other steps. `--size tiny --device cpu` tries all of it out; `middle` has 0.3 billion parameters.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from any_size import SHAPES, add_noise, recovered, write_model, write_texts
from measure import run as watch

HERE = Path(__file__)
sys.path += [str(HERE.parents[1] / "helpers"), str(HERE.parents[2] / "examples")]
COLUMNS = ("step", "name", "value", "unit", "asked")
DONE, PEAK = "done", "peak of the device's memory:"
TOLERANCE = 1 / 64
"""Between figures of a GPU and of the CPU in bf16, which has 8 bits: relative to the largest number of a tensor."""


@dataclass(frozen=True)
class Size:
    """How large each step is."""

    llama: str = "1.2B"
    training: int = 60_000
    epochs: int = 5
    inputs: int = 512
    solved: tuple[str, int, int] = ("resnet50", 512, 64)
    examples: int = 1000
    pixel: int = 1


SIZES = {"full": Size(), "middle": Size("0.3B"), "tiny": Size("tiny", 512, 1, 16, ("resnet18", 16, 32), 100, 4)}
"""In the tiny one every fourth pixel of an image is seen."""


@dataclass(frozen=True)
class Bench:
    """Attributes:
    out: where the table goes. work: for models. data: of the files of Fashion-MNIST.
    """

    out: Path
    work: Path
    data: Path
    device: str
    size: Size

    @property
    def table(self) -> Path:
        return self.out / "gpu_sizes.csv"

    def ended(self) -> set[str]:
        """Steps that need not be done again."""
        if not self.table.exists():
            return set()
        return {row["step"] for row in csv.DictReader(self.table.open(encoding="utf-8")) if row["name"] == DONE}

    def row(self, step: str, name: str, value: Any, unit: str = "", asked: str = "") -> None:
        """Print a figure, and keep it."""
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{step:9} {name}: {shown} {unit}{f' (asked: {asked})' if asked else ''}", flush=True)
        new = not self.table.exists()
        with self.table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            writer.writerow([step, name, shown, unit, asked])


def apart() -> None:
    """Accelerate keeps to one device per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def bf16(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    for name, kind in write_bf16_pairs(bench.work, llama=AutoModelForCausalLM, bert=AutoModelForMaskedLM).items():
        place = bench.work / name
        both = [place / "a", place / "b"]
        compared(bench, f"{name}, files", both, place)
        compared(bench, f"{name}, live", [kind.from_pretrained(p, dtype=torch.bfloat16) for p in both], place)


def compared(bench: Bench, name: str, pair: list[Any], place: Path) -> None:
    """A plan and a merge with data on the CPU and on the device."""
    from safetensors.torch import load_file

    import mergeid

    plans, merges, seen = [], [], []
    for device in ("cpu", bench.device):
        apart()
        with Heard() as heard:
            plans.append(mergeid.plan(*pair, data=place / "data.npz", device=device).to_json())
            out = {} if isinstance(pair[0], torch.nn.Module) else {"output": place / device}
            said = mergeid.merge(*pair, data=place / "data.npz", device=device, force=True, **out)
        state = load_file(place / device / "model.safetensors") if out else said.state
        merges.append((said.to_json(), {k: v.detach().double().cpu() for k, v in state.items()}))
        seen.append(dict(heard.seen))
    (cpu, ours), (there, theirs) = merges
    bench.row("bf16", f"{name}, answers of modules by device and format", seen[1])
    spaces = [[(s["id"], s["decision"]) for s in plan["spaces"]] for plan in plans]
    alike = sum(x == y for x, y in zip(*spaces, strict=True))
    bench.row("bf16", f"{name}, decisions alike", f"{alike} of {len(spaces[0])}", "", "all")
    for key in ("verdict", "repair"):
        bench.row("bf16", f"{name}, {key}", f"{there[key]}; CPU: {cpu[key]}", "", "alike")
    figures = [
        abs(x["j_match"] - y["j_match"])
        for x, y in zip(*(plan["spaces"] for plan in plans), strict=True)
        if x["j_match"] is not None and y["j_match"] is not None
    ]
    bench.row("bf16", f"{name}, largest gap between correlations", max(figures), "", f"≤ {TOLERANCE}")
    gaps = [float((ours[k] - theirs[k]).abs().max() / ours[k].abs().max().clamp(min=1e-9)) for k in ours]
    bench.row("bf16", f"{name}, merged tensors alike to the bit", f"{sum(g == 0 for g in gaps)} of {len(ours)}")
    bench.row("bf16", f"{name}, largest gap between merged tensors", max(gaps), "", f"≤ {TOLERANCE}")


class Heard:
    """Counts the answers of all modules by device and number format."""

    def __enter__(self) -> Heard:
        self.seen: Counter[str] = Counter()
        self._hook = torch.nn.modules.module.register_module_forward_hook(self._hear)
        return self

    def _hear(self, module: Any, args: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.seen[f"{out.device.type} {str(out.dtype).removeprefix('torch.')}"] += 1

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def write_bf16_pairs(folder: Path, **loaders: Any) -> dict[str, Any]:
    """Networks in bf16, their scrambled copies with noise, and texts; the loader of each."""
    import numpy as np
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    import mergeid

    small: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    }
    made = {"llama": (LlamaForCausalLM, LlamaConfig), "bert": (BertForMaskedLM, BertConfig)}
    for name, (kind, config) in made.items():
        torch.manual_seed(0)
        net = kind(config(**small)).bfloat16()
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1 * torch.randn_like(p)
        net.save_pretrained(folder / name / "a")
        mergeid.scramble(folder / name / "a", output=folder / name / "b", seed=3, force=True)
        file = folder / name / "b" / "model.safetensors"
        state = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
        ids = np.random.default_rng(1).integers(3, 500, size=(64, 32))
        np.savez(folder / name / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    return {name: loaders[name] for name in made}


def write_cnn(folder: Path, examples: int) -> Path:
    """The BatchNorm pair of the device cases, with so many labelled images."""
    import numpy as np
    from device_cases import write_pairs

    if not (folder / "cnn" / "b").exists():
        write_pairs(folder)
    draw = np.random.default_rng(1)
    images = draw.standard_normal((examples, 3, 12, 12), np.float32)
    np.savez(folder / "cnn" / "many.npz", pixel_values=images, labels=draw.integers(3, size=examples))
    return folder / "cnn"


def barrier(bench: Bench) -> None:
    from device_cases import differences

    import mergeid

    place, found = write_cnn(bench.work / "small", bench.size.examples), []
    for device in ("cpu", bench.device):
        apart()
        began = time.perf_counter()
        found.append(
            mergeid.barrier(
                place / "a", place / "b", data=place / "many.npz", match="auto", repair=True, points=11, device=device
            ).to_json()
        )
        bench.row("barrier", f"seconds on {device}", time.perf_counter() - began, "s")
    said = list(differences(*found, 1e-3))
    bench.row("barrier", "figures that differ by more than 1e-3", f"{len(said)} {said[:3]}", "", "0 []")
    bench.row("barrier", "barrier, CPU and device", f"{found[0]['barrier']} and {found[1]['barrier']}")


def auto(bench: Bench) -> None:
    place = write_cnn(bench.work / "small", bench.size.examples)
    used = command(bench, "auto", ["plan", place / "a", place / "b", "--data", place / "data.npz", "--device", "auto"])
    bench.row("auto", "peak GPU memory", used.device_peak / 2**20, "MiB", "> 0 where there is a GPU")


def resnet50(bench: Bench) -> None:
    from solve_cost import cost

    name, images, side = bench.size.solved
    found = cost(name, images, side, 64, bench.device)
    bench.row("resnet50", "both forward passes", found.forward, "s")
    bench.row("resnet50", "solve", found.solve, "s")
    bench.row("resnet50", "solve over forward", found.solve / found.forward, "times", "≤ 12")
    bench.row("resnet50", "layers changed", found.changed)


def small_stem() -> torch.nn.Module:
    """ResNet-18 for images of 28 pixels."""
    import timm

    net = timm.create_model("resnet18", pretrained=False, in_chans=1, num_classes=10)
    net.conv1 = torch.nn.Conv2d(1, 64, 3, 1, 1, bias=False)
    net.maxpool = torch.nn.Identity()
    return net


def resnet18(bench: Bench) -> None:
    from fashion_mnist import Images

    import mergeid

    device, size = bench.device, bench.size
    training = Images(bench.data, "train", stop=size.training)
    test = Images(bench.data, "t10k", stop=None if size.training >= 10_000 else 500)
    pixels = slice(2, -2, size.pixel)
    x, y = training.x[:, :, pixels, pixels].to(device), training.labels.to(device)
    seen, labels = test.x[:, :, pixels, pixels].to(device), test.labels.to(device)

    def accuracy(state: dict[str, Any]) -> float:
        net = small_stem().to(device).eval()
        net.load_state_dict(state)
        with torch.no_grad():
            right = sum(
                int((net(p).argmax(1) == t).sum()) for p, t in zip(seen.split(500), labels.split(500), strict=False)
            )
        return 100 * right / len(labels)

    ends = []
    for seed in (1, 2):
        began = time.perf_counter()
        net = trained(x, y, seed, size.epochs)
        ends.append(net)
        took = f"after {time.perf_counter() - began:.0f} s of training"
        bench.row("resnet18", f"seed {seed}, {took}", accuracy(net.state_dict()), "%", "≥ 90")
    mean = sum(accuracy(net.state_dict()) for net in ends) / 2
    inputs = list(x[: size.inputs].cpu())
    ways: dict[str, dict[str, Any]] = {
        "direct": {"match": "never", "repair": "none"},
        "matched": {"match": "always", "repair": "none"},
        "matched, BatchNorm repaired": {"match": "always", "repair": "bn"},
        "matched, solved": {"match": "always", "repair": "solve"},
        "default": {},
    }
    for name, how in ways.items():
        began = time.perf_counter()
        merged = mergeid.merge(*ends, data=inputs, example_inputs=x[:2], device=device, force=True, **how)
        found = accuracy(merged.state)
        bench.row("resnet18", f"{name}, {time.perf_counter() - began:.0f} s", found, "%")
        asked = "≤ 1.1, aim 0.7" if not how else ""
        bench.row("resnet18", f"{name}, below the ends' mean", mean - found, "points", asked)
        if not how:
            bench.row("resnet18", "default, verdict and repair", f"{merged.verdict}, {merged.to_json()['repair']}")


def trained(x: torch.Tensor, y: torch.Tensor, seed: int, epochs: int, batch: int = 256) -> torch.nn.Module:
    """AdamW on a one-cycle schedule, in bf16 on a GPU; in float32 again at the end."""
    torch.manual_seed(seed)
    net = small_stem().to(x.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    per_epoch = len(x) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * per_epoch)
    for _ in range(epochs):
        for at in torch.randperm(len(x)).to(x.device).split(batch)[:per_epoch]:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                loss = torch.nn.functional.cross_entropy(net(x[at]), y[at])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@dataclass(frozen=True)
class Used:
    """Seconds, and bytes at most, of one command."""

    seconds: float
    cpu: float
    anonymous: int
    device_peak: int


def command(bench: Bench, step: str, words: list[Any]) -> Used:
    """Run mergeid, and say what it took."""
    log = bench.out / f"{step}.log"
    told = watch([sys.executable, str(HERE), "--command", *map(str, words)], log=log)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    peak = next((int(line.split()[-1]) for line in reversed(lines) if line.startswith(PEAK)), 0)
    used = Used(told.seconds, told.cpu, told.anonymous, peak)
    bench.row(step, "wall", used.seconds, "s")
    bench.row(step, "CPU", used.cpu, "s")
    bench.row(step, "anonymous host memory", used.anonymous / 2**20, "MiB")
    bench.row(step, "GPU memory", used.device_peak / 2**20, "MiB")
    return used


def as_command(words: list[str]) -> int:
    """mergeid itself, and then the most that it held on the device. An answer that is "no" is no failure."""
    from mergeid.commands.cli import main as mergeid_main

    sys.argv = ["mergeid", *words]
    try:
        mergeid_main()
    except SystemExit as end:
        print("exit code:", end.code)
        return 0 if end.code == 1 else int(end.code or 0)
    finally:
        print(PEAK, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0, flush=True)


def models(bench: Bench) -> None:
    a, b, size = bench.work / "a", bench.work / "b", bench.size.llama
    made = bench.work / "made"
    if made.exists():
        return
    for folder in (a, b):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    write_model(a, size)
    write_texts(bench.work / "texts.safetensors", SHAPES[size][-1])
    bench.row("models", "writing", time.perf_counter() - began, "s")
    command(bench, "models", ["scramble", a, "-o", b, "--seed", "7"])
    began = time.perf_counter()
    add_noise(b)
    bench.row("models", "noise", time.perf_counter() - began, "s")
    made.touch()


def on_models(step: str, *words: str) -> Callable[[Bench], None]:
    """A command on the large pair and the texts."""

    def measured(bench: Bench) -> None:
        models(bench)  # another machine may have made the table
        a, b, out = (bench.work / name for name in ("a", "b", f"out-{step}"))
        shutil.rmtree(out, ignore_errors=True)
        verb, *more = words
        written = ["-o", out, "--force"] if verb == "merge" else []
        data = ["--data", bench.work / "texts.safetensors", "--device", bench.device]
        command(bench, step, [verb, a, b, *written, *data, *more])
        if written:
            bench.row(step, "recovered rows and columns", recovered(a, out), "", "1")

    return measured


STEPS: dict[str, Callable[[Bench], None]] = {
    "bf16": bf16,
    "barrier": barrier,
    "auto": auto,
    "resnet50": resnet50,
    "resnet18": resnet18,
    "models": models,
    "merge": on_models("merge", "merge"),
    "solved": on_models("solved", "merge", "--repair", "solve"),
    "predict": on_models("predict", "predict"),
    "plan": on_models("plan", "plan"),
}


def main() -> int:
    if sys.argv[1:2] == ["--command"]:
        return as_command(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], metavar="STEP", help="default: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-sizes"), help="folder for models")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a step at most")
    parser.add_argument("--here", action="store_true", help="run the one step in this process")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.out, given.work / given.size, given.data, given.device, SIZES[given.size])
    bench.work.mkdir(exist_ok=True)
    if given.here:
        warnings.simplefilter("ignore")
        try:
            STEPS[given.steps[0]](bench)
        except Exception as error:
            traceback.print_exc(limit=-6)
            bench.row(given.steps[0], "failed", f"{type(error).__name__}: {str(error)[-600:]}")
            return 1
        return 0
    shared = ["--out", given.out, "--work", given.work, "--data", given.data, "--device", given.device]
    words = [*map(str, shared), "--size", given.size]
    left = [step for step in given.steps or STEPS if step not in bench.ended()]
    failed = [step for step in left if not done(bench, step, words, given.limit)]
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def done(bench: Bench, step: str, words: list[str], limit: float) -> bool:
    """Whether a step ended well, within so many seconds, in a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(HERE), step, "--here", *words], start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.perf_counter() - began
    bench.row(step, DONE if code == 0 else f"stopped with {code}", took, "s")
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
