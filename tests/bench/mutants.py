"""Do the tests notice? Mutants of a file, made by mutmut, against the tests that go with it.

    python tests/bench/mutants.py mergeid/evidence/decide.py [MORE FILES] --sample 25 --most 60

Files named together share one copy and one run of the tests as they are.

A mutant is the file with one small change (an operator, a number, an argument). It is killed if a test fails or takes
ten times as long. The tests are those of the mirrored folder, and of tests/stages, that name the module (else all of
the mirrored folder), or those given with --tests; each mutant meets only the tests that reach its function, the fastest
first, as many as take --most seconds together. A sample is drawn with a seed, so that it can be drawn again.
`[tool.mutmut]` in pyproject.toml says what is left alone: the words of messages.

Rows go to tables/mutants.csv, survivors to tables/survivors.txt: mutmut's name of each, with the lines that it changes.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import json
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
        self.failed: set[str] = set()
        """Tests that fail in the copy as it is (they start a process elsewhere): they tell nothing of a mutant."""

    def pytest_runtest_teardown(self, item: object, nextitem: object) -> None:
        from mutmut.state import state

        for function in state()._stats:
            self.tests[function].add(item.nodeid)  # type: ignore[attr-defined]
        state()._stats.clear()

    def pytest_runtest_makereport(self, item: object, call: object) -> None:
        if call.excinfo is not None and call.excinfo.typename not in ("Skipped", "XFailed"):  # type: ignore[attr-defined]
            self.failed.add(item.nodeid)  # type: ignore[attr-defined]
        before = self.seconds.get(item.nodeid, 0.0)  # type: ignore[attr-defined]
        self.seconds[item.nodeid] = before + call.duration  # type: ignore[attr-defined]


def run(tests: list[str], *plugins: object, stop: bool = True) -> int:
    import pytest

    words = ["-q", "-n0", "-p", "no:cacheprovider", "--no-header", "--tb=no", *(["-x"] if stop else []), *tests]
    return int(pytest.main(words, plugins=list(plugins)))


def tried(name: str, tests: list[str], limit: float) -> bool:
    """Whether a mutant is killed, in a process of its own, which has so many seconds of CPU time."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        set_mutant_under_test(name)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.alarm(int(10 * limit))
        os._exit(0 if run(tests) == 0 else 1)
    return os.waitpid(child, 0)[1] != 0


def inside(files: list[str], tests: list[str], sample: int, seed: int, most: float, kept: Path | None) -> None:
    """In the copy: all about these files, a row and the survivors of each as soon as it is through.

    Args:
        most: seconds of tests that a mutant meets.
        kept: a file for what `Reached` notes, read where it is there.
    """
    from mutmut.configuration import config
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.utils.format_utils import mangled_name_from_mutant_name

    config()  # found from this folder, which tests may leave
    made = {file: mutated(file) for file in files}
    for file, (code, _) in made.items():
        Path(file).write_text(code, encoding="utf-8")
    reached = Reached()
    if kept is not None and kept.exists():
        reached.seconds, known = json.loads(kept.read_text())
        reached.tests.update({function: set(names) for function, names in known.items()})
    else:
        set_mutant_under_test("stats")
        if tests:
            run(tests, reached, stop=False)
        print(f"{len(reached.failed)} of {len(reached.seconds)} tests fail as they are, and are left out", flush=True)
        for found in reached.tests.values():
            found -= reached.failed
        if kept is not None:
            kept.write_text(json.dumps([reached.seconds, {f: sorted(t) for f, t in reached.tests.items()}]))
    for file, (code, names) in made.items():
        began, survivors = time.monotonic(), []
        chosen = sorted(random.Random(f"{seed} {file}").sample(names, min(sample, len(names))))
        for name in chosen:
            of = fastest(reached, mangled_name_from_mutant_name(name), most)
            killed = bool(of) and tried(name, of, 20 + SLOWER * sum(reached.seconds[t] for t in of))
            print(f"{name}: {'killed' if killed else 'SURVIVED' if of else 'SURVIVED, no test reaches it'}", flush=True)
            if not killed:
                survivors.append(name)
        seconds = round(time.monotonic() - began)
        row = [file, len(names), len(chosen), len(chosen) - len(survivors), len(survivors), seconds]
        text = [line for name in survivors for line in (name, *(f"    {one}" for one in changed_lines(code, name)))]
        recorded([str(entry) for entry in row], "".join(f"{line}\n" for line in text), file)
        print(", ".join(f"{c} {v}" for c, v in zip(COLUMNS, row, strict=True)), flush=True)


def fastest(reached: Reached, function: str, most: float) -> list[str]:
    """The tests that reach a function, the fastest first, as many as take that many seconds together."""
    found: list[str] = []
    seconds = 0.0
    for test in sorted(reached.tests[function], key=lambda t: reached.seconds[t]):
        seconds += reached.seconds[test]
        if found and seconds > most:
            break
        found.append(test)
    return found


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
    parser.add_argument("--tests", nargs="*", help="test files, in place of those that name the modules")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of tests that a mutant meets at the most")
    parser.add_argument("--reached", type=Path, help="keeps which test reaches what, for another run with these files")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.inside:
        inside(told.files, told.tests or [], told.sample, told.seed, told.most, told.reached)
        return
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in listed.stdout.decode().splitlines():
            if name.startswith(("mergeid/", "adapters/", "tests/", "examples/", "pyproject", "README")):
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        tests = (
            told.tests if told.tests is not None else list(dict.fromkeys(t for f in told.files for t in tests_of(f)))
        )
        words = [sys.executable, str(Path(__file__).resolve()), *told.files, "--inside", "--sample", str(told.sample)]
        kept = [] if told.reached is None else ["--reached", str(told.reached.resolve())]
        paths = {"PYTHONPATH": os.pathsep.join([folder, f"{folder}/adapters"])}
        subprocess.run(
            [*words, "--seed", str(told.seed), "--most", str(told.most), *kept, "--tests", *tests],
            cwd=folder,
            env={**os.environ, **paths},
        )


if __name__ == "__main__":
    main()
