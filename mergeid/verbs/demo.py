"""The demonstration: two networks from independent seeds on handwritten digits, merged directly and with mergeid.

Everything a user would do, through the verbs, on files. No download: the digits come with scikit-learn.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mergeid.basics.reading import json_text
from mergeid.errors import MergeidError
from mergeid.io.publish import whole_file, write_text, write_whole
from mergeid.request import options as o
from mergeid.request.request import Progress, Run, check_seed
from mergeid.verbs.barrier import barrier
from mergeid.verbs.load import load
from mergeid.verbs.merge import merge
from mergeid.verbs.plan import plan as plan_of

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import nn

    from mergeid.results.barrier import BarrierResult
    from mergeid.results.plan import Plan

ARCHITECTURE = "resnet10t"
EPOCHS, BATCH, RATE = 8, 64, 1e-3
SIDE, TRAINING = 32, 1297
"""Side of the images in pixels (8 in the original), and how many of the 1,797 are for training."""
CALIBRATION = 512
"""Training images, without their labels, that mergeid may look at."""
POINTS = 11
STEPS = EPOCHS * (TRAINING // BATCH)
MERGES: tuple[tuple[str, str, Literal["auto", "always", "never"], str], ...] = (
    ("plain average", "direct", "never", "none"),
    ("plain average", "direct-bn", "never", "bn"),
    ("matched", "matched", "always", "bn"),
    ("mergeid", "merged", "auto", "auto"),
)
"""Name, file, `--match` and `--repair` of each merge; the last one is what `mergeid merge` does by itself."""
AFTER = {
    "none": "nothing",
    "bn": "BatchNorm re-estimated",
    "regmean": "RegMean",
    "solve": "solved layer by layer",
    "solve+lean": "solved, leaning to one",
}
CURVES: tuple[tuple[str, Literal["always", "never"], bool], ...] = (
    ("plain average", "never", False),
    ("plain average", "never", True),
    ("matched", "always", True),
)
"""Label, `--match`, and whether BatchNorm statistics are estimated again at every point."""
_INITIAL_WEIGHTS = threading.Lock()
"""Initial weights come from a random generator that all threads share."""


@dataclass(frozen=True)
class Row:
    """One network of the comparison, as measured on the held-out digits.

    Attributes:
        name: "network a", "plain average", "matched", "mergeid". after: what was done to it when it was averaged.
    """

    name: str
    after: str
    file: Path
    accuracy: float
    loss: float


@dataclass
class DemoResult:
    """Everything that the demonstration found and wrote.

    Attributes:
        rows: both networks and their merges, mergeid's own last.
        curves: loss along the line, direct and matched.
        files: everything written, and what it is.
        reused: whether the two networks were there already.
        seconds: wall time in all.
    """

    folder: Path
    rows: list[Row]
    plan: Plan
    curves: list[BarrierResult]
    files: dict[Path, str]
    tested: int
    reused: bool
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        rows = [{**row.__dict__, "file": str(row.file)} for row in self.rows]
        return {
            "format": "mergeid.demo/1",
            "folder": str(self.folder),
            "architecture": f"timm/{ARCHITECTURE}",
            "reused": self.reused,
            "tested": self.tested,
            "networks": rows,
            "plan": self.plan.to_json(),
            "barriers": [curve.to_json() for curve in self.curves],
            "files": {str(path): meaning for path, meaning in self.files.items()},
            "seconds": round(self.seconds, 1),
        }

    def print(self, console: Console) -> None:
        """The plan, the comparison, and where everything lies."""
        from mergeid.reporting.show_plan import print_plan
        from mergeid.reporting.tables import Column, barrier_summary, make_table, number, percent

        print_plan(self.plan, console)
        console.print()
        columns = [Column(""), Column("afterwards"), Column("accuracy", "right"), Column("loss", "right")]
        rows = [[r.name, r.after, percent(r.accuracy), number(r.loss)] for r in self.rows]
        title = f"Measured on {self.tested} held-out digits"
        console.print(make_table(columns, rows, width=console.width, title=title))
        console.print()
        console.print(barrier_summary(self.curves, width=console.width, title="Barrier between a and b"))
        console.print()
        console.print(f"Everything is in {self.folder} ({self.seconds:.0f} s):", markup=False)
        for path, meaning in self.files.items():
            console.print(f"  {path.name:29} {meaning}", markup=False)
        a, b, data, held_out, *_ = self.files
        console.print("To do the same by hand:", markup=False)
        for command in (
            f"mergeid plan {a} {b} --data {data}",
            f"mergeid merge {a} {b} --data {data} -o merged.safetensors",
            f"mergeid barrier {a} {b} --data {held_out} --calibration {data} --repair --match auto",
        ):
            console.print(f"  {command}", markup=False, soft_wrap=True)


@dataclass
class _Digits:
    """Images [N, 1, side, side] float32 in [−1, 1] with labels [N] int64."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_digits() -> _Digits:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 pixels and split at random (fixed seed)."""
    import numpy as np
    import torch
    from sklearn import datasets
    from torch.nn import functional as F

    found = datasets.load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    images = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:TRAINING], order[TRAINING:]
    labels = found.target.astype(np.int64)
    return _Digits(images[train], labels[train], images[test], labels[test])


def train(digits: _Digits, seed: int, tell: Callable[[], None]) -> nn.Module:
    """AdamW on a one-cycle schedule; the seed decides the initial weights and the order of the images.

    Args:
        tell: called after every step (there are `STEPS`)."""
    import timm
    import torch
    from torch.nn import functional as F

    x, y = torch.from_numpy(digits.train_x), torch.from_numpy(digits.train_y)
    order = torch.Generator().manual_seed(seed)
    with _INITIAL_WEIGHTS, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(ARCHITECTURE, pretrained=False, in_chans=1, num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            tell()
    return model.eval()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small are done sooner by one thread each than by threads that wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Folder:
    """Where the demonstration writes; nothing but its own files is ever replaced."""

    path: Path

    def recipe(self, seed: int) -> dict[str, str]:
        import torch

        return {
            "mergeid.verbs.demo": f"{EPOCHS} epochs, seed {seed}, torch {torch.__version__}",
            "architecture": f"timm/{ARCHITECTURE}",
            "format": "pt",
        }

    def prepare(self) -> None:
        """Make the folder. Raises `MergeidError` where it holds something else than an earlier demonstration."""
        if self.path.exists() and not self.path.is_dir():
            raise MergeidError(f"output {self.path} is a file; expected the name of a folder (option -o)")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._ours():
            raise MergeidError(
                f"output folder {self.path} holds files that are not from an earlier demo; choose another name "
                "(option -o)"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MergeidError(
                f"output folder {self.path} cannot be created: {(error.strerror or str(error)).lower()}; choose "
                "another place (option -o)"
            ) from None

    def _ours(self) -> bool:
        return self._metadata("a") is not None or self._metadata("b") is not None

    def _metadata(self, name: str) -> dict[str, str] | None:
        """The metadata of one of the demonstration's two networks, None for anything else."""
        from mergeid.io.header import read_header

        try:
            found = read_header(self.path / f"{name}.safetensors").metadata
        except MergeidError:
            return None
        return found if "mergeid.verbs.demo" in found else None

    def networks(self, seeds: dict[str, int], digits: _Digits, progress: Progress, force: bool) -> bool:
        """Train and save what is missing, side by side; whether everything was there already (trained this way)."""
        from safetensors.torch import save

        from mergeid.io.header import in_order

        missing = {n: s for n, s in seeds.items() if force or self._metadata(n) != self.recipe(s)}
        steps, lock, stop = itertools.count(1), threading.Lock(), threading.Event()

        def tell() -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            with lock:
                progress("training two networks", next(steps), STEPS * len(missing))

        def make(name: str, seed: int) -> None:
            path = self.path / f"{name}.safetensors"
            content = in_order(save(train(digits, seed, tell).state_dict(), metadata=self.recipe(seed)))
            with whole_file(path, "-o") as partial:
                write_text(partial, content)

        with ThreadPoolExecutor(2) as pool:
            try:
                list(pool.map(make, missing, missing.values()))
            except BaseException:
                stop.set()  # else the pool would wait for both to finish
                raise
        return not missing


def run(
    output: Annotated[
        Path, o.Option("Folder to write everything to.", o.OUTPUT, "FOLDER", ("-o", "--output"), Path)
    ] = Path("mergeid-demo"),
    *,
    force: Annotated[bool, o.switch("Train and write again, replacing an earlier demo.", o.OUTPUT)] = False,
    seed: o.Seed = 0,
    progress: Progress | None = None,
) -> DemoResult:
    """Train, plan, merge directly and with mergeid, measure, draw.

    Args:
        output: made if it is not there; an earlier demonstration's networks in it are reused.
        force: train again.
        seed: the networks have the seeds 2·seed + 1 and 2·seed + 2.
        progress: (stage, done, total).

    Raises:
        MergeidError: the folder holds something else or cannot be written.
    """
    import numpy as np

    from mergeid.reporting.page.content import Measured
    from mergeid.reporting.plots import plot_barriers

    check_seed(seed)
    began = time.perf_counter()
    folder = Path(output)
    place = _Folder(folder)
    place.prepare()
    digits = load_digits()
    a, b, data, held_out = (folder / n for n in ("a.safetensors", "b.safetensors", "calibration.npz", "test.npz"))
    with one_thread():
        seeds = {"a": (2 * seed + 1) % 2**63, "b": (2 * seed + 2) % 2**63}
        reused = place.networks(seeds, digits, progress or (lambda *_: None), force)
        for path, arrays in (
            (data, {"x": digits.train_x[:CALIBRATION]}),
            (held_out, {"x": digits.test_x, "labels": digits.test_y}),
        ):
            with whole_file(path, "-o") as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # names of arrays, not the option of that name
        plan = plan_of(a, b, data=data, progress=progress)
        rows = [_row("network a", "", a, held_out), _row("network b", "", b, held_out)]
        made = {}
        for name, stem, match, repair in MERGES:
            output = made[stem] = folder / f"{stem}.safetensors"
            done = merge(a, b, output=output, match=match, data=data, repair=repair, force=True, progress=progress)
            after = AFTER["none"] if done.repair is None else AFTER.get(str(done.repair["kind"]), AFTER["bn"])
            rows.append(_row(name, after, output, held_out))
        curves = [
            barrier(
                a,
                b,
                data=held_out,
                calibration=data,
                match=match,
                repair=repair,
                points=POINTS,
                device="cpu",
                label=label,
                progress=progress,
            )
            for label, match, repair in CURVES
        ]
    best = rows[-1]
    plot = plot_barriers(
        [replace(c, label=f"{c.label}, BatchNorm re-estimated" if c.repair else c.label) for c in curves],
        folder / "barrier.png",
        title="From network a to network b",
        marks=[Measured(f"mergeid ({best.after})", best.loss, best.accuracy)],
    )
    files = {
        a: "network a",
        b: "network b",
        data: "calibration images",
        held_out: "test images with labels",
        made["merged"]: f"mergeid's merge: {best.after}",
        made["matched"]: "matched, BatchNorm re-estimated",
        made["direct"]: "plain average",
        made["direct-bn"]: "plain average, BatchNorm re-estimated",
        plot: "loss and accuracy on the way from a to b",
        folder / "demo.json": "these results",
    }
    result = DemoResult(folder, rows, plan, curves, files, len(digits.test_y), reused)
    result.seconds = time.perf_counter() - began
    write_whole(folder / "demo.json", json_text(result.to_json(), indent=1) + "\n", "-o")
    return result


def _row(name: str, after: str, file: Path, data: Path) -> Row:
    from mergeid.data import collate, load_data
    from mergeid.evaluate.measure import evaluate_loaded
    from mergeid.models.examples import Examples

    loaded = load(file)
    examples = Examples(load_data(data, adapter=loaded.adapter, arch=loaded.arch), collate)
    found = evaluate_loaded(loaded, examples, Run(batch_size=64))
    return Row(name, after, file, found.accuracy or 0.0, found.loss)
