"""Tables keep to the terminal's width, plots are whole files of the asked kind."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mergeid.errors import MergeidError
from mergeid.reporting import plots, tables
from mergeid.reporting.tables import Column, barrier_points, barrier_summary, make_table, middle, number, percent
from mergeid.results.barrier import BarrierResult

GRID = tuple(k / 10 for k in range(11))


def result(height: float, label: str = "", accuracies: bool = True) -> BarrierResult:
    return BarrierResult(
        GRID,
        tuple(0.3 + 4 * height * x * (1 - x) for x in GRID),
        tuple(0.9 - height * x * (1 - x) for x in GRID) if accuracies else None,
        10_000,
        repair=True,
        label=label,
    )


def lines(table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()


SPACES = [
    Column("space", shrink=True),
    Column("size", "right"),
    Column("group"),
    Column("where", shrink=True),
    Column("share", "right"),
    Column("note", shrink=True, optional=1),
]
ROWS = [
    ["residual stream of the encoder", 1024, "S1024", "encoder.layer.0.attention.query.weight[1] +70", 0.23, None],
    [
        "encoder.layer.0.attention heads",
        12,
        "S12 ≀ S32",
        "encoder.layer.0.attention.query.weight[0]",
        0.0,
        "per head " * 4,
    ],
]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_row_is_one_line_of_the_terminal(width):
    shown = lines(make_table(SPACES, ROWS, width=width, title="Neuron graph", caption="2 spaces"), width)
    assert all(cell_len(line) <= width for line in shown)
    text = "\n".join(shown)
    first = [line for line in shown if "S1024" in line]
    assert len(first) == 1 and "1,024" in first[0] and "0.230" in first[0]
    assert first[0].startswith("residual") and "+70" in first[0]  # both ends of a name stay readable
    assert len([line for line in shown if "S12 ≀ S32" in line]) == 1
    assert ("not shown at this width: note" in text) == (width <= 80)
    assert ("per head" in text) == (width > 80)
    assert shown[0].startswith("Neuron graph") and "2 spaces" in shown[-1]


@given(st.lists(st.lists(st.text(max_size=40), min_size=4, max_size=4), max_size=4), st.integers(30, 130))
def test_no_table_is_wider_than_the_terminal(rows, width):
    columns = [
        Column("name", shrink=True),
        Column("b", shrink=True, optional=1),
        Column("c", shrink=True),
        Column("d", shrink=True),
    ]
    assert all(cell_len(line) <= width for line in lines(make_table(columns, rows, width=width), width))


def test_cells_are_never_read_as_markup():
    shown = lines(
        make_table([Column("name")], [["[red]weight[0]"], [Text("styled", style="red")], [True]], width=80), 80
    )
    assert [line.strip() for line in shown[2:]] == ["[red]weight[0]", "styled", "yes"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        make_table([Column("a"), Column("b")], [["x"]], width=80)


@given(st.text(max_size=60), st.integers(1, 40))
def test_middle_keeps_both_ends(text, width):
    short = middle(text, width)
    assert cell_len(short) <= width
    assert short == text if cell_len(text) <= width else True


def test_middle_by_example():
    assert middle("encoder.layer.0.weight", 11) == "encod…eight"


def test_numbers():
    assert [number(x) for x in (0.0, 1.23456, -0.5, 1e-7, 1e9, None)] == [
        "0.000",
        "1.235",
        "-0.500",
        "1e-07",
        "1.0e+09",
        "–",
    ]
    assert (number(math.inf), number(math.nan)) == ("inf", "nan")
    assert (percent(0.8876), percent(None)) == ("88.8 %", "–")


@pytest.mark.parametrize("width", [80, 120])
def test_barrier_tables(width):
    results = [result(1.2, "direct"), result(1.4, "always match"), result(0.2, "mergeid")]
    summary = lines(barrier_summary(results, width=width), width)
    assert [line.split()[0] for line in summary[2:5]] == ["direct", "always", "mergeid"]
    assert all(text in summary[2] for text in ("re-estimated", "0.300", "1.200", "0.5", "30.0 points"))
    points = lines(barrier_points(results, width=width), width)
    assert len([line for line in points if line.startswith("0.5")]) == 1
    assert ("mergeid accuracy" in points[0]) == (width == 120)
    alone = lines(barrier_points(results[:1], width=width), width)
    assert all(cell_len(line) <= width for line in [*summary, *points, *alone])
    assert any("1.500" in line and "60.0 %" in line and "█" * 20 in line for line in alone)


def test_curves_on_different_grids_share_no_table():
    other = BarrierResult((0.0, 1.0), (1.0, 1.0), None, 3)
    with pytest.raises(ValueError, match="different λ grids"):
        barrier_points([result(1), other], width=80)


def test_barrier_tables_of_broken_networks():
    losses = (0.3, math.inf, 0.3)
    broken = BarrierResult((0.0, 0.5, 1.0), losses, None, 3)
    assert "inf" in lines(barrier_summary([broken], width=80), 80)[2]
    assert "inf" in lines(barrier_points([broken], width=80), 80)[3]


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize(
    "results",
    [
        result(1),
        [result(1.2, "direct"), result(0.2, "mergeid")],
        [result(1, "direct", accuracies=False), BarrierResult((0.0, 0.5, 1.0), (1.0, math.inf, math.nan), None, 3)],
    ],
    ids=["one", "two", "broken"],
)
def test_barrier_plots(results, suffix, tmp_path):
    path = tmp_path / f"plot.{suffix}"
    path.write_text("old")
    assert plots.plot_barriers(results, path, title="resnet18") == path
    if suffix == "png":
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 300 and image.std() > 0.05
    else:
        words = "".join(ElementTree.parse(path).getroot().itertext())
        assert "resnet18" in words and "loss (nats)" in words
        assert all(
            (curve.label or "a to b") in words
            for curve in ([results] if isinstance(results, BarrierResult) else results)
        )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    plots.plot_barriers(results, path, title="resnet18")
    assert path.read_bytes() == first


@pytest.mark.parametrize("kind", ["line", "bar"])
@pytest.mark.parametrize("count", [3, 120])
def test_plots_by_depth(kind, count, tmp_path):
    names = [f"layer{i}" for i in range(count)]
    series = {"identity": [0.1] * count, "matched": [0.5, None, math.nan, *[0.6] * (count - 3)]}
    intervals = {"matched": [(0.4, 0.6), None, None, *[(0.5, 0.7)] * (count - 3)]}
    path = plots.plot_by_depth(names, series, tmp_path / "d.svg", ylabel="index ι", kind=kind, intervals=intervals)
    words = "".join(ElementTree.parse(path).getroot().itertext())
    assert all(word in words for word in ("layer0", "identity", "matched", "index ι"))
    with pytest.raises(ValueError, match="'short' has 1 values"):
        plots.plot_by_depth(names, {"short": [1.0]}, tmp_path / "d.svg", ylabel="")


def test_a_plot_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "plot.png"
    path.write_text("old")

    def draw(figure):
        figure.subplots()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plots.save_plot(draw, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_paths_that_cannot_be_plotted_to_are_named(tmp_path):
    with pytest.raises(MergeidError, match=r"plot.jpg does not end in .png or .svg"):
        plots.plot_barriers(result(1), tmp_path / "plot.jpg")
    with pytest.raises(MergeidError, match=r"the folder of the plot .* does not exist"):
        plots.plot_barriers(result(1), tmp_path / "none" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MergeidError, match=r"cannot write --plot .*folder.png .is a directory"):
        plots.plot_barriers(result(1), tmp_path / "folder.png")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_importing_the_reports_loads_neither_matplotlib_nor_torch():
    code = (
        f"import sys, {tables.__name__}, {plots.__name__}; sys.exit(bool({{'torch', 'matplotlib'}} & {{*sys.modules}}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
