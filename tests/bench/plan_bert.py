"""What a plan of a BERT-base pair takes beyond its forward passes: `python tests/bench/plan_bert.py`.

Two networks of BERT-base's configuration (110 million parameters, random weights; B is A with noise, its neurons
scrambled) and 512 sentences of 64 random tokens. The forward passes of both models alone are timed in the same run; the
plan makes them too. Times are seconds of the cores used, and of the clock; memory is the process's peak, both models and
all imports included.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

import mergeid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.1, help="of a weight tensor's own spread")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        a, b, scrambled = (Path(folder) / name for name in ("a", "b", "scrambled"))
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(num_hidden_layers=options.layers)).eval()
        model.save_pretrained(a)
        with torch.no_grad():
            for p in model.parameters():
                spread = p.std() if p.numel() > 1 else p.abs()
                p += options.noise * spread * torch.randn(p.shape, generator=generator)
        model.save_pretrained(b)
        mergeid.scramble(b, output=scrambled, seed=1)
        ids = torch.randint(1000, 30000, (options.sentences, options.tokens), generator=generator)
        data = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
        clock, cores = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for _ in range(2):
                for part in ids.split(32):
                    model(part)
        del model
        forward = time.perf_counter() - clock, time.process_time() - cores
        report("forward passes of both", *forward)
        clock, cores = time.perf_counter(), time.process_time()
        plan = mergeid.plan(a, scrambled, data=data)
        whole = time.perf_counter() - clock, time.process_time() - cores
        report("plan", *whole)
        report("plan beyond them", whole[0] - forward[0], whole[1] - forward[1])
        moved = [s for s in plan.spaces if s.decision == "match"]
        print(f"{plan.verdict}: {len(moved)} of {len(plan.spaces)} spaces matched")


def report(what: str, clock: float, cores: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:24} {clock:7.1f} s   {cores:7.1f} s of cores   peak so far {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
