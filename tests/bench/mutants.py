"""Do the tests notice? Mutants of a file, made by mutmut, against the tests that go with it.

    python tests/bench/mutants.py mergeid/evidence/decide.py [MORE FILES] --sample 25

A mutant is the file with one small change (an operator, a number, an argument). It is killed if a test fails or takes
ten times as long. The tests are those of the mirrored folder, and of tests/stages, that name the module (else all of
the mirrored folder), or those given with --tests; each mutant meets only the tests that reach its function, the fastest
first. A sample is drawn with a seed, so that it can be drawn again. `[tool.mutmut]` in pyproject.toml says what is left
alone: the words of messages.

Rows go to tables/mutants.csv, survivors to tables/survivors.txt: mutmut's name of each, with the lines that it changes.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "tables"
COLUMNS = ("file", "mutants", "sample", "killed", "survived", "seconds")
SLOWER = 10
"""Times as long as unchanged, and 20 seconds: a mutant that takes longer is killed."""


def tests_of(file: str) -> list[str]:
    """Test files of the mirrored folder and of tests/stages that name the module."""
    module = file.removesuffix(".py").replace("/", ".")
    folders = dict.fromkeys((ROOT / "tests" / Path(file).parts[1], ROOT / "tests" / "stages"))
    names = (f"{module} import", f"import {module}", f"{module}.")
    found = [p for folder in folders for p in sorted(folder.glob("test_*.py"))]
    named = [p for p in found if any(n in p.read_text(encoding="utf-8") for n in names)]
    mirrored = ROOT / "tests" / Path(file).parts[1]
    return [str(p.relative_to(ROOT)) for p in named or [p for p in found if p.parent == mirrored]]


def mutated(file: str) -> tuple[str, list[str]]:
    """The file with all of its mutants in it, and their names."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    made = mutate_file_contents(file, Path(file).read_text(encoding="utf-8"))
    return made.code, [get_mutant_name(Path(file), name) for name in made.mutant_names]


def changed_lines(code: str, name: str) -> list[str]:
    """What a mutant changes, as the lines of a diff."""
    from mutmut.utils.format_utils import mangled_name_from_mutant_name

    wanted = name.rpartition(".")[2]
    original = mangled_name_from_mutant_name(name).rpartition(".")[2] + "__mutmut_orig"
    bodies = {
        n.name: [line.strip() for line in ast.unparse(n).splitlines()[1:]]
        for n in ast.walk(ast.parse(code))
        if isinstance(n, ast.FunctionDef) and n.name in (wanted, original)
    }
    lines = difflib.unified_diff(bodies.get(original, []), bodies.get(wanted, []), lineterm="", n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


class Reached:
    """A plugin of pytest that notes which functions every test reaches, and how long it takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_teardown(self, item: object, nextitem: object) -> None:
        from mutmut.state import state

        for function in state()._stats:
            self.tests[function].add(item.nodeid)  # type: ignore[attr-defined]
        state()._stats.clear()

    def pytest_runtest_makereport(self, item: object, call: object) -> None:
        before = self.seconds.get(item.nodeid, 0.0)  # type: ignore[attr-defined]
        self.seconds[item.nodeid] = before + call.duration  # type: ignore[attr-defined]


def run(tests: list[str], *plugins: object) -> int:
    import pytest

    return int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "--no-header", *tests], plugins=list(plugins)))


def tried(name: str, tests: list[str], limit: float) -> bool:
    """Whether a mutant is killed, in a process of its own."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        set_mutant_under_test(name)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(limit) + 1)
        os._exit(0 if run(tests) == 0 else 1)
    return os.waitpid(child, 0)[1] != 0


def inside(file: str, tests: list[str], sample: int, seed: int) -> None:
    """In the copy: all about one file, the result on the last lines."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    began = time.monotonic()
    code, names = mutated(file)
    Path(file).write_text(code, encoding="utf-8")
    chosen = sorted(random.Random(f"{seed} {file}").sample(names, min(sample, len(names))))
    reached = Reached()
    set_mutant_under_test("stats")
    if tests and run(tests, reached) != 0:
        sys.exit(f"{file}: its tests fail as it is")
    survivors = []
    for name in chosen:
        from mutmut.utils.format_utils import mangled_name_from_mutant_name

        of = sorted(reached.tests[mangled_name_from_mutant_name(name)], key=lambda t: reached.seconds[t])
        limit = 20 + SLOWER * sum(reached.seconds[t] for t in of)
        killed = bool(of) and tried(name, of, limit)
        print(f"{name}: {'killed' if killed else 'SURVIVED' if of else 'SURVIVED, no test reaches it'}", flush=True)
        if not killed:
            survivors.append(name)
    row = (file, len(names), len(chosen), len(chosen) - len(survivors), len(survivors), round(time.monotonic() - began))
    with open("row.csv", "w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerow(row)
    text = [line for name in survivors for line in (name, *(f"    {one}" for one in changed_lines(code, name)))]
    Path("survivors.txt").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")


def recorded(row: list[str], survivors: str, file: str) -> None:
    """Into the tables, in place of what they said of this file."""
    path, listed = TABLES / "mutants.csv", TABLES / "survivors.txt"
    rows = {r[0]: r for r in csv.reader(path.read_text().splitlines()[1:])} if path.exists() else {}
    rows[file] = row
    with open(path, "w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *(rows[f] for f in sorted(rows))])
    kept: dict[str, str] = {}
    for block in (listed.read_text() if listed.exists() else "").split("# "):
        head, _, rest = block.partition("\n")
        kept |= {head: rest} if head else {}
    kept[file] = survivors
    listed.write_text("".join(f"# {f}\n{kept[f]}" for f in sorted(kept) if kept[f]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="of the package, such as mergeid/evidence/decide.py")
    parser.add_argument("--sample", type=int, default=25, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="*", help="test files, in place of those that name the module")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.inside:
        inside(told.files[0], told.tests or [], told.sample, told.seed)
        return
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for file in told.files:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            for name in files.stdout.decode().splitlines():
                if name.startswith(("mergeid/", "adapters/", "tests/", "examples/", "pyproject", "README")):
                    (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, Path(folder) / name)
            tests = told.tests if told.tests is not None else tests_of(file)
            words = [sys.executable, str(Path(__file__).resolve()), file, "--inside", "--sample", str(told.sample)]
            paths = {"PYTHONPATH": os.pathsep.join([folder, f"{folder}/adapters"])}
            done = subprocess.run(
                [*words, "--seed", str(told.seed), "--tests", *tests], cwd=folder, env={**os.environ, **paths}
            )
            if done.returncode == 0:
                row = next(csv.reader((Path(folder) / "row.csv").read_text().splitlines()))
                recorded(row, (Path(folder) / "survivors.txt").read_text(encoding="utf-8"), file)
                print(", ".join(f"{c} {v}" for c, v in zip(COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    main()
