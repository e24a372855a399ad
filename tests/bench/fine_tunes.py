"""What seeing that two fine-tunes share their neurons costs, and what two swapped neurons do.

    python tests/bench/fine_tunes.py --work FOLDER [--size 1.2B]

Two Llama-type models of one base (those of `merge_sizes.py`) are merged plainly (``--match never``) and by default.
Then two neurons of one MLP are swapped by hand in B, in its files, and the default merge is run again: it must give
what the first one gave. Wall and CPU time, and anonymous memory; asked are 1.3 times the plain merge's wall time, and
300 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from measure import Usage, run
from merge_sizes import SIZES, write_model

LAYER, ONE, OTHER = 3, 17, 304


def rows_of(file: Path, name: str) -> np.memmap:
    """A matrix in a file, as 16-bit words that can be written."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[name]
    shape = tuple(entry["shape"])
    return np.memmap(file, np.uint16, "r+", 8 + size + entry["data_offsets"][0], shape)


def swap(folder: Path) -> None:
    """Two neurons of an MLP change places: rows of two matrices, columns of a third."""
    file, at = folder / "model.safetensors", f"model.layers.{LAYER}.mlp."
    for name in ("gate_proj", "up_proj"):
        value = rows_of(file, f"{at}{name}.weight")
        value[[ONE, OTHER]] = value[[OTHER, ONE]]
        value.flush()
    value = rows_of(file, f"{at}down_proj.weight")
    value[:, [ONE, OTHER]] = value[:, [OTHER, ONE]]
    value.flush()


def merged(work: Path, out: str, *options: str) -> Usage:
    words = [
        sys.executable,
        "-m",
        "mergeid",
        "merge",
        str(work / "a"),
        str(work / "b"),
        "-o",
        str(work / out),
        "--force",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return run([*words, *options], environment=environment, log=work / f"{out}.log", interval=0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="1.2B")
    parser.add_argument("--rounds", type=int, default=2, help="of which the quickest counts")
    given = parser.parse_args()
    for own, name in ((1, "a"), (2, "b")):
        write_model(given.work / name, given.size, own)
    plain = min((merged(given.work, "plain", "--match", "never") for _ in range(given.rounds)), key=lambda u: u.seconds)
    usual = min((merged(given.work, "usual") for _ in range(given.rounds)), key=lambda u: u.seconds)
    swap(given.work / "b")
    try:
        swapped = merged(given.work, "swapped")
    finally:
        swap(given.work / "b")
    for name, used in (("as they are", plain), ("by default", usual), ("two neurons swapped", swapped)):
        print(
            f"{name:20} {used.seconds:6.1f} s ({used.seconds / plain.seconds:.2f} times the plain merge), "
            f"{used.cpu:6.1f} CPU s, {used.anonymous / 2**20:.0f} MiB"
        )
    files = [given.work / n / "model.safetensors" for n in ("plain", "usual", "swapped")]
    same = [files[0].read_bytes() == f.read_bytes() for f in files[1:]]
    print(f"default = plain: {same[0]}; two neurons swapped = plain: {same[1]}")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
