"""How long opening, building, tracing and proving take for N models and a base: now, and before there was a workbench.

    python tests/bench/workbench.py [ARCHITECTURE ...] [--before COMMIT] [--rounds 3]

"Before" is the code of that commit, in a work tree of its own: there every pair of the first model with another was
loaded, traced and proven by itself. Both versions take turns; the figures are the smallest of all rounds, in seconds of
one core, so that other work on the machine counts little. The table goes to tables/workbench.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT, TABLE = Path(__file__).parents[2], Path(__file__).parent / "tables" / "workbench.csv"
BEFORE = "d563b57"
"""The last commit of the old middle."""
COUNTS = (2, 5)
COMMON = """
import sys, time
files, arch = sys.argv[2:], sys.argv[1]
def timed(work):
    work(files[:3])  # imports, and what libraries cache
    began = time.process_time()
    work(files)
    print(time.process_time() - began)
"""
NOW = """
from mergeid.models.workbench import Workbench
from mergeid.request.request import Reading, Run
from mergeid.stages.open import open_models, pair_of
def work(files):
    met = open_models(Workbench(Reading(arch), Run()), files[1:], files[0])
    for other in met.everyone[1:]:
        pair_of(met, other)
timed(work)
"""
THEN = """
from mergeid.models.pair import load_base, load_pair, open_models
def work(files):
    how = dict(arch=arch, skip=(), allow_pickle=False, seed=0)
    met = open_models(files[1:], files[0], skip=(), config=None, arch=arch, widths=True, allow_pickle=False)
    first, *others = met.agreed.models
    for other in [*others, met.agreed.base]:
        load_pair(first, other, device="cpu", dtype=None, config=None, example_inputs=None, progress=None, **how)
timed(work)
"""
FILES = """
import sys, timm, torch
from safetensors.torch import save_file
for i, file in enumerate(sys.argv[2:]):
    torch.manual_seed(i)
    save_file(timm.create_model(sys.argv[1]).state_dict(), file)
"""


def run(code: str, tree: Path, *words: str) -> str:
    """What a fresh process prints that imports mergeid from that work tree."""
    paths = {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "adapters")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, **paths}, cwd=tree, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().rpartition("\n")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=["test_resnet", "resnet18"])
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    rows: list[tuple[object, ...]] = [("architecture", "models", "now", "before", "ratio")]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), told.before], cwd=ROOT, check=True)
        try:
            for name in told.architectures:
                files = [str(Path(folder) / f"{name}-{i}.safetensors") for i in range(max(COUNTS) + 1)]
                run(FILES, ROOT, name, *files)
                for n in COUNTS:
                    words = (f"timm/{name}", *files[: n + 1])
                    both = [
                        (run(COMMON + NOW, ROOT, *words), run(COMMON + THEN, tree, *words)) for _ in range(told.rounds)
                    ]
                    now, then = (min(map(float, column)) for column in zip(*both, strict=True))
                    rows.append((name, f"{n} + 1", f"{now:.2f}", f"{then:.2f}", f"{now / then:.2f}"))
                    print(*rows[-1], flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    with open(TABLE, "w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
