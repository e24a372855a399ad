"""Places: models, data and outputs that are links, pipes, sockets, devices or folders, under names of every kind."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from .. import odd
from ..case import Case, campaign
from . import models

NAMES = (
    "new\nline", "\x1b[31m", "sp ace", "日本語", "-dash", "%s{0}", "'q\"", "a" * 255, "a" * 240, "💥" * 60,
    "\udcff\udcfe", ".hidden", "~tilde", "a+b", "org@v", "con:fig", "\t", "[glob]*", "$(id)", "trail.", " lead",
)  # fmt: skip
ODD = (
    "link", "dead", "loop", "empty", "file", "zero.safetensors", "dir.safetensors", "pipe.safetensors", "z.safetensors",
    "socket", "hard.safetensors", "shallow.safetensors", "/proc/self/mem", "/dev/stdin", "/", "/proc", "a/config.json",
    "a/../a", "a/", "a//", "./a", "~", "~nobody", "a@main", "a+b", "a+", "+a", "@", "http://x/y", "C:\\x", "*",
)  # fmt: skip
OUT = (
    "link", "dead", "empty", "dir.safetensors", "pipe.safetensors", "z.safetensors", "socket", "a", "b", "d.npz", "a/x",
    "a/model.safetensors", "a/config.json", "a/vocab.txt", "a/mergeid.json", "a/x.safetensors", "loop/x", "file/x",
    "b/../a", "hard.safetensors", "/dev/null", "/dev/stdout", "/proc/self/x", ".",
)  # fmt: skip


@campaign("places", share=1.2, processes=60)
def places(rng: random.Random, folder: Path) -> Case:
    models.put(folder, "a", "b", "d.npz")
    _fill(folder)
    roll = rng.random()
    if roll < 0.3:
        return _named(rng, folder)
    if roll < 0.65:
        place = rng.choice((*ODD, odd.word(rng)))
        words = rng.choice(
            (
                ["merge", place, "b", "--match", "never", "-o", "o"],
                ["graph", place],
                ["predict", "a", place],
                ["extract", place, "--base", "a", "-o", "o"],
                ["similarity", "a", "b", "--data", place, "--limit", "8"],
                ["merge", "a", "b", "--match", "never", "-o", "o", "--chat-template", place],
            )
        )
        return Case(words if place else ["merge"], ("o",))
    out = rng.choice(OUT)
    words = rng.choice(
        (
            ["merge", "a", "b", "--match", "never", "-o", out],
            ["graph", "a", "-o", out],
            ["graph", "a", "--json", out],
            ["plan", "a", "b", "-o", out],
            ["barrier", "a", "b", "--data", "d.npz", "--points", "2", "--resume", out],
            ["sketch", "a", "--data", "d.npz", "-o", f"{out}.sketch"],
            ["extract", "b", "--base", "a", "-o", out],
            ["merge", "a", "b", "--match", "never", "-o", "o", "--report", out],
        )
    )
    text = words[0] in ("graph", "plan", "barrier") or "--report" in words  # which replace an earlier file unasked
    free = ("dead", "d.npz", "b", "loop", "nowhere") if text else ("nowhere",)
    return Case(
        words, ("o", "mergeid.json", "a.sketch", "nowhere", "empty", "a/x", *free, f"{out}.sketch"), replaced=free
    )


def _named(rng: random.Random, folder: Path) -> Case:
    """A model, or an output, under an odd name."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        try:
            os.rename(folder / "a", folder / name)
        except OSError:
            return Case(["merge"])
        more = rng.choice(
            (["merge", "--match", "never", "-o", "o"], ["plan", "-o", "o.json"], ["plan", "--report", "o.html"])
        )
        return Case([*more, "--", name, "b"], ("o", "o.json", "o.html"))
    ending = rng.choice(("", ".safetensors", ".sketch"))
    if ending == ".sketch":
        return Case(["sketch", "a", "--data", "d.npz", f"--output={name}.sketch"], (f"{name}.sketch",))
    output = name + ending
    left = (output, "mergeid.json", f"{name}.mergeid.json")
    return Case(["merge", "a", "b", "--match", "never", f"--output={output}"], left)


def _fill(folder: Path) -> None:
    for name, target in (("link", "a"), ("dead", "nowhere"), ("loop", "loop"), ("z.safetensors", "/dev/zero")):
        (folder / name).symlink_to(target)
    (folder / "shallow.safetensors").symlink_to("a/model.safetensors")
    os.link(folder / "a" / "model.safetensors", folder / "hard.safetensors")
    for name in ("empty", "dir.safetensors"):
        (folder / name).mkdir()
    (folder / "file").write_text("x")
    (folder / "zero.safetensors").write_bytes(b"")
    os.mkfifo(folder / "pipe.safetensors")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as made:  # whose names may not be long
        os.chdir(folder)
        try:
            made.bind("socket")
        finally:
            os.chdir(here)
