"""Command lines: every option with odd numbers, names, globs and places."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from ..files import pair, safetensors
from . import models

NAMES = ["layers.0.weight", "layers.1.weight", "head.bias"]
PLAIN: dict[str, tuple[str, ...]] = {
    "--weights": ("0.5,0.5", "1,1", "0.3,0.7", "-1,2", "nan,1", "inf,0", "1e400,1", "0.5", "0.5,0.5,0.5", ",",
    "*=0.1,0.9", "head*=1,0",
                  "=1,1", "a=b", "0,0", "1e308,1e308", "0.5,0.5000001", "٣,1", "[=0.5,0.5"),
    "--method": ("linear", "slerp", "karcher", "ties", "zip", "Linear", "model_stock", "fisher", "dare_ties",
    "task_arithmetic", "regmean"),
    "--density": ("0.5", "0", "1", "2", "-1", "nan", "0.5,0.5", "1e-300", "x"),
    "--set": ("lambda=1", "lambda=", "=1", "lambda", "tol=nan", "max_iter=1e9", "max_iter=-1", "normalize=maybe",
    "density=0.5", "t=0.5",
              "lambda=1,2,3", "lambda=1e999", "max_iter=²", "filter_wise=true", "alpha=-1"),
    "--dtype": ("float32", "float16", "bfloat16", "float64", "int8", "F32", "fp16", "float8_e4m3fn", "complex64"),
    "--skip": ("*", "head*", "layers.?.weight", "[", "[]", "[!", "**", "", "nothing", "\\"),
    "--seed": ("0", "-1", "1e3", str(2**31), str(2**63), str(2**64), str(10**400), "x", "٣", "1_0", " 1", "0x1", "1.0"),
    "--batch-size": ("0", "-1", "1", str(2**63), "x", "nan"),
    "--limit": ("0", "-5", "1", str(2**64), "1.5"),
    "--match": ("never", "auto", "always", "NEVER", "", "sometimes"),
    "--repair": ("none", "auto", "bn", "repair", "x"),
    "--device": ("cpu", "cuda", "cuda:0", "cuda:99", "mps", "xla", "meta", "cpu:7", ":", "CPU", "tpu"),
    "--matcher": ("weight", "activation", "combined", "layerwise", "cycle", "sinkhorn", "straight_through", "ot", "x"),
    "--arch": ("timm/test_resnet", "resnet18x", "transformers/bert", "timm/", "/", "config.json", "a.safetensors",
    "timm/vit_*", "org/name"),
    "--base": ("c.safetensors", "a.safetensors", "nothing", "b"),
    "--data": ("nothing.npz", "a.safetensors", ".", "/dev/null", "/dev/zero", "module:function", "os:getcwd",
    "sys:exit", "r.yaml"),
    "-o": ("o.safetensors", "o", "a.safetensors", "./a.safetensors", "link.safetensors", "/dev/null", "/dev/full",
    "/proc/x", ".", "..", "/",
           "no/such/o.safetensors", "pipe", "o.json", "o.bin", "o/", "o.safetensors/", "a.safetensors/x",
           "x" * 300 + ".safetensors", "dir",
           "~/o", "-"),
}  # fmt: skip
FLAGS = (
    "--force",
    "--json",
    "--normalize",
    "--no-repair",
    "--transport",
    "--allow-pickle",
    "--help",
    "-h",
    "--version",
    "--traceback",
    "--",
)
VERBS = ("plan", "predict", "rank", "sketch", "align", "barrier", "similarity", "graph", "scramble", "zip", "adapters")
DEAR = ("--matcher", "--data")


@campaign("values", share=9, processes=50)
def values(rng: random.Random, folder: Path) -> Case:
    for name, table in zip(("a", "b"), pair(rng, NAMES, [[3, 3], [3, 3], [3]]), strict=True):
        (folder / f"{name}.safetensors").write_bytes(safetensors(table))
    (folder / "c.safetensors").write_bytes(safetensors(pair(rng, NAMES, [[3, 3], [3, 3], [3]])[0]))
    (folder / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n")
    (folder / "link.safetensors").symlink_to("a.safetensors")
    (folder / "dir").mkdir()
    os.mkfifo(folder / "pipe")
    roll = rng.random()
    if roll < 0.8:
        words = _merge(rng)
    elif roll < 0.92:
        words = _other(rng)
    elif roll < 0.93:
        return _running(rng, folder)
    else:
        words = [
            odd.word(rng) if rng.random() < 0.5 else rng.choice((*VERBS, *FLAGS)) for _ in range(rng.randrange(1, 4))
        ]
    if "demo" in words or _stray(words):
        words = ["merge"]
    outputs = tuple(dict.fromkeys(_output(words)))
    replaced = ("dir",) if "--force" not in words else ("dir", "o", "o.safetensors")
    return Case(words, outputs, replaced=tuple(r for r in replaced if r != "dir" or "dir" in words))


def _merge(rng: random.Random) -> list[str]:
    words = ["merge", "a.safetensors", "b.safetensors"]
    if rng.random() < 0.2:
        words[rng.randrange(1, 3)] = rng.choice(
            ("r.yaml", "a.safetensors", "nothing", "dir", "pipe", ".", "link.safetensors", odd.word(rng))
        )
    if rng.random() < 0.05:
        words.insert(rng.randrange(1, 4), odd.word(rng))
    chosen = {"--match": "never", "-o": "o.safetensors"}
    for option in rng.sample([o for o in PLAIN if o not in DEAR], rng.choice((1, 1, 2, 3))):
        chosen[option] = rng.choice(PLAIN[option]) if rng.random() < 0.75 else odd.word(rng)
    if rng.random() < 0.03:
        option = rng.choice(DEAR)
        chosen[option] = rng.choice(PLAIN[option])
    for option, value in chosen.items():
        words += [option, value] if option == "-o" or rng.random() < 0.8 else [f"{option}={value}"]
    words += rng.sample(FLAGS, rng.choice((0, 0, 0, 1, 2)))
    if rng.random() < 0.04:
        del words[rng.randrange(1, len(words))]
    return words


def _other(rng: random.Random) -> list[str]:
    """Another verb on models that no library knows, so that nothing runs for long."""
    verb = rng.choice(VERBS)
    words = [
        verb,
        *(
            rng.choice(("a.safetensors", "b.safetensors", "dir", "nothing", odd.word(rng)))
            for _ in range(rng.randrange(3))
        ),
    ]
    if verb == "adapters":
        return [verb, rng.choice(("vit_tiny*", "[", "**", "x", "timm/test_*", odd.word(rng)))]
    for option in rng.sample(list(PLAIN), rng.choice((0, 1, 2))):
        words += [option, rng.choice(PLAIN[option]) if rng.random() < 0.75 else odd.word(rng)]
    words += rng.sample(FLAGS, rng.choice((0, 0, 1)))
    return words


def _running(rng: random.Random, folder: Path) -> Case:
    """A verb that runs, with one or two options that mean something."""
    models.put(folder, "a", "b", "d.npz")
    verb, more, outputs = rng.choice(
        (
            (
                "barrier",
                ["b", "--data", "d.npz", "--points", rng.choice(("2", "1", "0", "-1", "3", str(2**40), "x"))],
                (),
            ),
            ("plan", ["b", *(["--data", "d.npz"] if rng.random() < 0.5 else [])], ()),
            ("merge", ["b", "--data", "d.npz", "-o", "o"], ("o",)),
            ("scramble", ["-o", "o"], ("o",)),
            (
                "graph",
                ["--why", rng.choice(("classifier.weight[1]", "classifier.weight[9]", "x[0]", "[", odd.word(rng)))],
                (),
            ),
            ("similarity", ["b", "--data", "d.npz", "--layers", rng.choice(("*", "[", "nothing", "classifier"))], ()),
            ("align", ["--to", "b", "-o", "o"], ("o",)),
            ("predict", ["b", "--data", "d.npz"], ()),
            ("rank", ["b", *(["--try", "--data", "d.npz"] if rng.random() < 0.5 else ["--every"])], ()),
            ("sketch", ["--data", "d.npz", "-o", "o.sketch"], ("o.sketch",)),
        )
    )
    words = [verb, "a", *more]
    option = rng.choice(("--seed", "--limit", "--batch-size", "--device", "--matcher", "--skip", "--arch", "--match"))
    value = rng.choice(PLAIN[option]) if rng.random() < 0.8 else odd.word(rng)
    return Case([*words, option, value], outputs)


@functools.cache
def _home() -> str:
    return os.path.expanduser("~")


def _output(words: list[str]) -> list[str]:
    """Names in the folder that the command line asks for (and the record's)."""
    found = [
        "mergeid.json",
        "o.mergeid.json",
        "merged.safetensors",
        "merged",
        "aligned.safetensors",
        "aligned",
        "zipped",
    ]
    for i, word in enumerate(words):
        given = (
            words[i + 1] if word in ("-o", "--output", "--json", "--plot", "--resume") and i + 1 < len(words) else None
        )
        if word.startswith(("--output=", "--json=", "-o")) and len(word) > 2:
            given = word.partition("=")[2] or word[2:]
        if given:
            found.append(os.path.normpath(given))
            found.append(f"{Path(given).stem}.mergeid.json")
    return [f for f in found if f not in (".", "..") and not f.startswith(("/", ".."))]


def _stray(words: list[str]) -> bool:
    """Whether an output could go outside of the case's folder (or everywhere in it), where nobody would look."""
    for i, word in enumerate(words):
        given: Any = words[i + 1] if word in ("-o", "--output") and i + 1 < len(words) else ""
        if word.startswith(("-o", "--output=")) and len(word) > 2:
            given = word.partition("=")[2] or word[2:]
        if given and (given.startswith(("/etc", "~", "../", "/work", "/home")) or given in ("..", "../x")):
            return True
    return False
