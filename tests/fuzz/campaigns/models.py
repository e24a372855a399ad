"""Models that can run, made once: two BERTs of 3,499 parameters with data, a graph and sketches."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
MAKE = """
import sys, json, os
os.chdir(sys.argv[1])
import numpy as np, torch, timm
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
for seed, name in enumerate("ab"):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                        max_position_embeddings=32, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(name)
    open(f"{name}/vocab.txt", "w").write("\\n".join(json.loads(sys.argv[2])))
    json.dump({"tokenizer_class": "BertTokenizer"}, open(f"{name}/tokenizer_config.json", "w"))
    torch.manual_seed(seed)
    save_file(timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict(), f"{name}.safetensors")
np.savez("d.npz", input_ids=np.arange(200).reshape(20, 10) % 40, labels=np.arange(20) % 3)
import contextlib
from mergeid.commands.cli import run
with contextlib.redirect_stdout(sys.stderr):
    for words in (["graph", "a", "--json", "g.json"], ["sketch", "a", "--data", "d.npz", "-o", "a.sketch"],
                  ["sketch", "b", "--data", "d.npz", "-o", "b.sketch"],
                  ["barrier", "a", "b", "--data", "d.npz", "--points", "3", "--resume", "r.json", "-o", "x.json"],
                  ["plan", "a", "b", "-o", "p.json"], ["plan", "a", "b", "--data", "d.npz", "-o", "pd.json"],
                  ["merge", "a", "b", "-o", "m", "--match", "never"]):
        code = run(words)
        if code:
            sys.exit(f"{words}: {code}")
"""


@functools.cache
def folder() -> Path:
    """a/ and b/ (BERT), a.safetensors and b.safetensors (test_resnet, one channel, 3 classes), d.npz, g.json, a.sketch,
    b.sketch, r.json (a barrier to resume), p.json and pd.json (saved plans), m/ (a merge with its record)."""
    home = Path(os.environ.get("MERGEID_FUZZ_MODELS") or tempfile.mkdtemp(prefix="mergeid-fuzz-models-"))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "pd.json").exists():
        root = Path(__file__).parents[3]
        here = os.pathsep.join((str(root), str(root / "adapters"), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
        command = [sys.executable, "-c", MAKE, str(home), json.dumps(WORDS)]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.PIPE, text=True)
    return home


@functools.cache
def content(name: str) -> bytes:
    return (folder() / name).read_bytes()


def put(place: Path, *names: str) -> None:
    """Copies of models or files in a case's folder."""
    for name in names:
        source = folder() / name
        if source.is_dir():
            (place / name).mkdir()
            for file in source.iterdir():
                (place / name / file.name).write_bytes(content(f"{name}/{file.name}"))
        else:
            (place / name).write_bytes(content(name))
