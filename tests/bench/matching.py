"""Speed of every matcher on five architectures, and of rebasin's coordinate descent on ResNet-50 in the same run.

    python tests/bench/matching.py [--only CASE …] [--matchers NAME …] [--limit SECONDS] [--rebasin PYTHON]

B is A with noise of 10 % of every tensor's norm, under a random element of the group (random weights: this measures
speed and whether the planted element comes back, not whether a merge is good). ``independent`` pairs are two seeds,
where no element is right and descent takes many passes. One row per pair and matcher in ``tables/matching.csv``; rows
that are there are not measured again. Seconds are CPU seconds of one thread, so that they mean the same on a shared
machine; what takes longer than ``--limit`` is stopped and said to be.

``llama-1b`` has the widths of Llama 3.2 1B (hidden 2,048, MLP 8,192, 32 heads, 8 of keys and values), two of its 16
layers and 4,000 of its 128,256 words: what one layer takes is what counts, and the machine is small.
``mlp-14336`` is one layer with the MLP width of Llama 3 8B (14,336) and a quarter of its hidden width, for the memory
of wide layers, which the square of the width decides; both models and the pair's copies are in its peak.

``--rebasin`` names the interpreter of an environment with rebasin 0.0.47 (``pip install rebasin==0.0.47 timm``); it
gets the same two state dicts. Both sides maximise ⟨A, π(B)⟩ over the weights as they are; the objective is computed
here for both, over the tensors that rebasin moves (it leaves the statistics of BatchNorm where they are).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.evidence.taps import choose_taps
from mergeid.matchers import MatchTask, Training, WeightSimilarity, get_matcher, matcher_names, weight_matching
from mergeid.matchers.layerwise import layerwise_matching
from mergeid.matchers.weight import good_start
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.neuron_graph.trace import trace

TABLE = Path(__file__).parent / "tables" / "matching.csv"
FIELDS = ("case", "pair", "matcher", "cpu_seconds", "objective", "planted", "right", "peak_mb", "note")
NOISE = 0.1
Batch = dict[str, Tensor]


def _images(size: int) -> Batch:
    return {"x": torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(9))}


def _words(vocabulary: int) -> Batch:
    return {"input_ids": torch.randint(5, vocabulary, (32, 16), generator=torch.Generator().manual_seed(9))}


def _bert() -> nn.Module:
    config = transformers.BertConfig(num_labels=10, attn_implementation="eager")
    return transformers.BertForSequenceClassification(config)


def _llama(hidden: int, inner: int, layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=4000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "resnet18": (lambda: timm.create_model("resnet18"), lambda: _images(64)),
    "resnet50": (lambda: timm.create_model("resnet50"), lambda: _images(64)),
    "vit-s": (lambda: timm.create_model("vit_small_patch16_224", img_size=32), lambda: _images(32)),
    "bert-base": (_bert, lambda: _words(30_000)),
    "llama-1b": (lambda: _llama(2048, 8192, 2), lambda: _words(4000)),
    "mlp-14336": (lambda: _llama(1024, 14336, 1), lambda: _words(4000)),
}


def forward(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return model(inputs["x"]) if "x" in inputs else model(**inputs).logits


def built(case: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CASES[case][0]().eval()


@dataclass
class Pair:
    """A task, and where it is known the element that undoes what was planted."""

    task: MatchTask
    truth: Element | None


def pair_of(case: str, kind: str, graph: NeuronGraph, a: nn.Module) -> Pair:
    generator = torch.Generator().manual_seed(3)
    state = {k: v.detach() for k, v in a.state_dict().items()}
    truth = None
    if kind == "planted":
        element = graph.random_element(generator)
        truth = {k: np.argsort(p) for k, p in element.items()}
        other = {}
        for name, value in state.items():
            other[name] = value
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                other[name] = value + noise * (NOISE * value.norm() / max(value.numel(), 1) ** 0.5)
        other = graph.apply_state(element, other)
    else:
        other = built(case, 1).state_dict()
    return Pair(MatchTask(graph, state, other, torch.Generator().manual_seed(0)), truth)


def with_data(task: MatchTask, case: str, a: nn.Module) -> MatchTask:
    """The task with correlations and with labels that A itself gives."""
    batch = CASES[case][1]()
    b = built(case, 0)
    b.load_state_dict(task.b)
    taps = choose_taps(task.graph, a)
    flat = [t for found in taps.values() for t in found]
    halves = [{k: v[i : i + 8] for k, v in batch.items()} for i in range(0, 32, 8)]
    stream = PairStream(TapReader(a, forward, flat), TapReader(b, forward, flat), lambda: iter(halves))
    evidence = ActivationEvidence(task.graph, stream, taps)
    evidence.collect()
    with torch.no_grad():
        labels = forward(a, batch).argmax(-1)

    def batches() -> Iterator[Batch]:
        for i in range(0, 32, 8):
            yield {**{k: v[i : i + 8] for k, v in batch.items()}, "labels": labels[i : i + 8]}

    def loss(output: Tensor, examples: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, -2), examples["labels"].flatten())

    training = Training(a, forward, loss, batches)
    return MatchTask(task.graph, task.a, task.b, task.generator, evidence.correlations(), training)


def _measured(pair: Pair, matcher: str, limit: int, out: Any) -> None:
    """In a process of its own: match, and send what came out."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    began = time.process_time()
    found = get_matcher(matcher).match(pair.task)
    seconds = time.process_time() - began
    similarity = WeightSimilarity(pair.task.graph, pair.task.a, pair.task.b)
    row: dict[str, Any] = {"cpu_seconds": f"{seconds:.2f}", "objective": f"{similarity.objective(found):.6g}"}
    if pair.truth is not None:
        row["planted"] = f"{similarity.objective(pair.truth):.6g}"
        right = sum(int((found[k] == p).sum()) for k, p in pair.truth.items())
        row["right"] = f"{right / sum(map(len, found.values())):.4f}"
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    out.send(row)


def measured(pair: Pair, matcher: str, limit: int) -> dict[str, Any]:
    """A row; the process is a fork, so that a matcher that takes too long can be stopped."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(False)
    process = context.Process(target=_measured, args=(pair, matcher, limit, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        stopped = process.exitcode in (-24, -9)  # SIGXCPU, SIGKILL
        return {"note": f"stopped after {limit} s" if stopped else f"failed with exit code {process.exitcode}"}
    finally:
        process.join()


class Table:
    """Rows on disk, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, *key: str) -> bool:
        return any((r["case"], r["pair"], r["matcher"]) == key for r in self.rows)

    def add(self, case: str, pair: str, matcher: str, row: dict[str, Any]) -> None:
        self.rows.append({"case": case, "pair": pair, "matcher": matcher, **row})
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)
        print(" ".join(f"{k}={v}" for k, v in self.rows[-1].items() if v not in (None, "")), flush=True)


def graph_of(case: str, model: nn.Module) -> NeuronGraph:
    few = {k: v[:2] for k, v in CASES[case][1]().items()}
    return trace(model, few, lambda: forward(model, few), name=case)


def beside_rebasin(case: str, kind: str, python: str, pair: Pair, table: Table) -> None:
    """rebasin, and weight matching with its objective."""
    graph, a, b = pair.task.graph, pair.task.a, pair.task.b
    counted = [k for k in graph.on_tensor if "running_" not in k]
    similarity = WeightSimilarity(graph.on_tensors(counted), a, b, scale=False)

    def weight() -> Element:
        return weight_matching(similarity, generator=torch.Generator().manual_seed(0), element=good_start(similarity))

    ours = {"layerwise, unscaled": lambda: layerwise_matching(similarity), "weight, unscaled": weight}
    for name, match in ours.items():
        if not table.has(case, kind, name):
            began = time.process_time()
            found = match()
            seconds = time.process_time() - began
            row = {"cpu_seconds": f"{seconds:.2f}", "objective": f"{similarity.objective(found):.6g}"}
            if pair.truth is not None:
                row["planted"] = f"{similarity.objective(pair.truth):.6g}"
            table.add(case, kind, name, row)
    if not table.has(case, kind, "rebasin 0.0.47"):
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / name) for name in ("a.safetensors", "b.safetensors", "out.safetensors")]
            for path, state in zip(paths, (a, b), strict=False):
                save_file({k: v.contiguous() for k, v in state.items()}, path)
            script = Path(__file__).parent / "matching_rebasin.py"
            ran = subprocess.run([python, str(script), case, *paths], capture_output=True, text=True, check=True)
            told = json.loads(ran.stdout.splitlines()[-1])
            moved = load_file(paths[2])
        objective = sum(float((a[k] * moved[k]).sum(dtype=torch.float64)) for k in counted)
        row = {"cpu_seconds": f"{told['seconds']:.2f}", "objective": f"{objective:.6g}"}
        table.add(case, kind, "rebasin 0.0.47", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--matchers", nargs="+", choices=matcher_names(), default=matcher_names())
    parser.add_argument("--limit", type=int, default=300, help="CPU seconds for one matcher (%(default)s)")
    parser.add_argument("--rebasin", metavar="PYTHON", help="interpreter of an environment with rebasin and timm")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(arguments.table)
    for case in arguments.only:
        kinds = ("planted", "independent") if case.startswith(("resnet", "mlp")) else ("planted",)
        wanted = {k: [m for m in arguments.matchers if not table.has(case, k, m)] for k in kinds}
        wanted["independent"] = [m for m in wanted.get("independent", []) if m == "weight"]
        beside = arguments.rebasin and case == "resnet50"
        if not any(wanted.values()) and not beside:
            continue
        model = built(case, 0)
        graph = graph_of(case, model)
        for kind in kinds:
            pair = pair_of(case, kind, graph, model)
            if beside:
                beside_rebasin(case, kind, arguments.rebasin, pair, table)
            told = pair
            if any(get_matcher(m).needs != "weights" for m in wanted[kind]):
                told = Pair(with_data(pair.task, case, model), pair.truth)
            for matcher in wanted[kind]:
                given = pair if get_matcher(matcher).needs == "weights" else told
                table.add(case, kind, matcher, measured(given, matcher, arguments.limit))


if __name__ == "__main__":
    sys.exit(main())
