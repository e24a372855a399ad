"""What a plan of a BERT-base pair takes beyond its forward passes: `python tests/bench/plan_bert.py`.

Two networks of BERT-base's configuration (110 million parameters, random weights; B is A with noise, its neurons
scrambled) and 512 sentences of 64 random tokens. The plan and bare forward passes (both models, all sentences, once)
run one after the other in processes of their own; times with imports, and peak memory with both models in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from measure import run
from transformers import BertConfig, BertForMaskedLM

DATA = """
import torch

IDS = torch.randint(1000, 30000, ({sentences}, {tokens}), generator=torch.Generator().manual_seed(0))


def sentences():
    return [{{"input_ids": x, "attention_mask": torch.ones_like(x)}} for x in IDS]
"""
FORWARD = """
import sys, torch, sentences
from transformers import BertForMaskedLM

for path in sys.argv[1:]:
    model = BertForMaskedLM.from_pretrained(path).eval()
    with torch.no_grad():
        for part in sentences.IDS.split(32):
            model(input_ids=part, attention_mask=torch.ones_like(part))
"""


def make(a: Path, b: Path, layers: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_hidden_layers=layers)).eval()
    model.save_pretrained(a)
    with torch.no_grad():
        for p in model.parameters():
            spread = p.std() if p.numel() > 1 else p.abs()
            p += noise * spread * torch.randn(p.shape, generator=generator)
    model.save_pretrained(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--noise", type=float, default=0.1, help="of a weight tensor's own spread")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, b, scrambled = (folder / k for k in ("a", "b", "scrambled"))
        make(a, b, options.layers, options.noise)
        python = [sys.executable]
        log = folder / "log"
        run([*python, "-m", "mergeid", "scramble", str(b), "-o", str(scrambled), "--seed", "1"], log=log)
        (folder / "sentences.py").write_text(DATA.format(sentences=options.sentences, tokens=options.tokens))
        path = os.pathsep.join(x for x in (str(folder), os.environ.get("PYTHONPATH", "")) if x)
        environment = {**os.environ, "PYTHONPATH": path}
        forward = run([*python, "-c", FORWARD, str(a), str(scrambled)], environment=environment, log=log)
        out = folder / "plan.json"
        command = [*python, "-m", "mergeid", "plan", str(a), str(scrambled), "--data", "sentences:sentences"]
        plan = run([*command, "-o", str(out)], environment=environment, log=log)
        peak, anonymous = plan.peak / 2**30, plan.anonymous / 2**30
        print(f"forward passes alone  {forward.seconds:7.1f} s   peak {forward.peak / 2**30:.2f} GiB")
        print(f"plan                  {plan.seconds:7.1f} s   peak {peak:.2f} GiB, anonymous {anonymous:.2f} GiB")
        print(f"plan beyond them      {plan.seconds - forward.seconds:7.1f} s")
        print(f"in CPU seconds        {plan.cpu:.1f} and {forward.cpu:.1f}, beyond them {plan.cpu - forward.cpu:.1f} s")
        said = json.loads(out.read_text())
        matched = [s for s in said["spaces"] if s["decision"] == "match"]
        print(f"{said['verdict']}: {len(matched)} of {len(said['spaces'])} spaces matched")


if __name__ == "__main__":
    main()
