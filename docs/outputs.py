"""Run the verbs on the demonstration's two networks and keep what they print, for the documentation.

    mergeid demo -o mergeid-demo && python docs/outputs.py mergeid-demo

Every block of output in the documentation is one of the files that this writes. What only differs from run to run
(seconds, temporary names) is left as it came.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

FILES = Path(__file__).parent / "pages" / "output"
RUNS = {
    "explain": "explain barrier",
    "adapters": "adapters vit_tiny*",
    "graph": "graph a.safetensors",
    "scramble": "scramble a.safetensors -o scrambled.safetensors --seed 7",
    "plan": "plan a.safetensors b.safetensors --data calibration.npz --limit 256",
    "plan-weights": "plan a.safetensors b.safetensors",
    "merge": "merge a.safetensors b.safetensors --data calibration.npz --limit 256 -o merged.safetensors",
    "barrier": "barrier a.safetensors b.safetensors --data test.npz --points 5",
    "barrier-matched": "barrier a.safetensors b.safetensors --data test.npz --calibration calibration.npz --match auto "
    "--repair --points 5",
    "align": "align b.safetensors --to a.safetensors --data calibration.npz --limit 256 -o b-in-order.safetensors",
    "predict": "predict a.safetensors b.safetensors --data calibration.npz --limit 256",
    "predict-try": "predict a.safetensors b.safetensors --data calibration.npz --limit 256 --try",
    "sketch": "sketch a.safetensors --data calibration.npz -o a.sketch",
    "sketch-b": "sketch b.safetensors --data calibration.npz -o b.sketch",
    "predict-sketches": "predict a.sketch b.sketch",
    "similarity": "similarity a.safetensors b.safetensors --data test.npz --limit 128",
    "zip": "zip a.safetensors b.safetensors --data calibration.npz --limit 256 -o zipped",
    "solve": "merge a.safetensors b.safetensors --data calibration.npz --limit 256 --repair solve "
    "-o solved.safetensors",
    "report": "report a.safetensors b.safetensors --data test.npz --calibration calibration.npz --points 5 --limit 200 "
    "-o report.html",
}


def main(demo: Path, only: list[str]) -> None:
    from mergeid.commands.cli import run

    os.environ["COLUMNS"] = "100"
    FILES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.safetensors", "b.safetensors", "calibration.npz", "test.npz"):
            shutil.copy(demo / name, folder)
        os.chdir(folder)
        for name, line in RUNS.items():
            if only and name not in only:
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                code = run(line.split())
            text = "\n".join(x.rstrip() for x in out.getvalue().replace(f"{os.getcwd()}/", "").splitlines())
            (FILES / f"{name}.txt").write_text(f"$ mergeid {line}\n{text}\n", encoding="utf-8")
            print(name, code, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
