"""What a second process saves: plan, merge and barrier on the same pair and examples, from one process and from two.

    python tests/bench/processes.py [--processes 2] [--examples 1003] [--width 256] [--layers 4] [--tokens 64]

A BERT classifier with random weights and its scrambled copy with noise. Every process has one thread; imports and a
small run before are not counted. `busy` is the CPU time of the process that had most to do, which other programs on the
machine change little; `wall` is what a clock says. Exits with 1 if results differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HELPERS = Path(__file__).parents[1] / "helpers"
AIM = 0.65
"""Most of the time of one process that two should take."""


def write_pair(folder: Path, options: argparse.Namespace) -> None:
    from shared_worker import write_partner
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    width = options.width
    config = BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=options.tokens,
        num_labels=4,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "a")
    write_partner(folder, BertForSequenceClassification)
    generator = np.random.default_rng(1)
    shape = (options.examples, options.tokens)
    np.savez(
        folder / "data.npz",
        input_ids=generator.integers(5, 1000, size=shape),
        attention_mask=np.ones(shape, np.int64),
        labels=generator.integers(4, size=options.examples),
    )


def measured(folder: Path, output: Path) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    """Per verb the wall and the CPU seconds of this process, and what came out."""
    import mergeid

    a, b = folder / "a", folder / "b"
    how: dict[str, Any] = {"data": folder / "data.npz", "limit": None}
    verbs = {
        "plan": lambda: mergeid.plan(a, b, **how),
        "merge": lambda: mergeid.merge(a, b, output=output, force=True, **how),
        "barrier": lambda: mergeid.barrier(a, b, data=how["data"], points=11),
    }
    mergeid.merge(a, b, output=output, force=True, data=how["data"], limit=32)
    mergeid.barrier(a, b, data=how["data"], points=2, limit=32)
    seconds, found = {}, {}
    for name, verb in verbs.items():
        wall, busy = time.perf_counter(), time.process_time()
        result = verb().to_json()
        seconds[name] = time.perf_counter() - wall, time.process_time() - busy
        found[name] = {k: v for k, v in result.items() if k not in ("report", "files", "seconds")}
    return seconds, found


def worker(folder: Path, output: Path) -> None:
    from accelerate import Accelerator

    from mergeid.basics import processes

    torch.set_num_threads(1)
    accelerator = Accelerator()
    with processes.together():
        seconds, found = measured(folder, output)
        everyone = processes.everyones(seconds)
    if accelerator.is_main_process:
        output.with_suffix(".json").write_text(json.dumps([everyone, found]))
    accelerator.end_training()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"processes": 2, "examples": 1003, "width": 256, "layers": 4, "tokens": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sys.path.insert(0, str(HELPERS))
    from launching import launched

    results = []
    with tempfile.TemporaryDirectory() as name:
        write_pair(Path(name), options)
        for count in (1, options.processes):
            output = Path(name) / f"merged{count}"
            done = launched(count, [__file__, "--worker", name, str(output)], timeout=3600)
            if done.returncode:
                print(done.stderr[-3000:])
                return 1
            results.append(json.loads(output.with_suffix(".json").read_text()))
    (one, alike), (several, others) = results
    print(f"{options.examples} examples; seconds with 1 and with {len(several)} processes; aim {AIM}")
    print(f"{'verb':<8} {'wall':>15} {'ratio':>6} {'busy':>15} {'ratio':>6}  same result")
    for verb in one[0]:
        cells = []
        for k in range(2):
            before, after = one[0][verb][k], max(p[verb][k] for p in several)
            cells.append(f"{before:7.1f} {after:7.1f} {after / before:6.2f}")
        print(f"{verb:<8} {' '.join(cells)}  {'yes' if alike[verb] == others[verb] else 'NO'}")
    return int(alike != others)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
