"""``mergeid graph``: which neurons of a model may change places, found and proven."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import to_text, working
from mergeid.errors import MergeidError
from mergeid.io.output import check_files, check_new
from mergeid.io.publish import write_whole
from mergeid.request.options import HOW, OUTPUT
from mergeid.verbs.graph import graph

if TYPE_CHECKING:
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


@command_of(graph)
def command(
    call: Call[NeuronGraph],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{o.MODEL[0].upper()}{o.MODEL[1:]}, or an architecture's name (resnet18, timm/resnet18).",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, o.written("Also write the graph as a JSON file.")] = None,
    json_target: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            rich_help_panel=OUTPUT,
            help="Write the graph as JSON to FILE instead of showing it; to stdout without FILE.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", rich_help_panel=OUTPUT, help="One row per space, with all of its axes.")
    ] = False,
    why: Annotated[
        str | None,
        typer.Option(
            "--why",
            metavar="AXIS",
            rich_help_panel=HOW,
            help="Explain one axis, such as 'conv1.weight[1]': its space, or why it is frozen.",
        ),
    ] = None,
    force: o.Force = False,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            rich_help_panel=HOW,
            help="Verify this graph (JSON, written or corrected by hand) instead of tracing one.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Show which neurons of a model can be permuted: its neuron graph, traced from one forward pass and verified."""
    target = Path(json_target) if json_target not in (None, "-") else None
    check_files({"--json": target, "-o": output}, (model, given, *call.reads))
    if not force:
        check_new({"--json": target, "-o": output})
    files = {option: file for option, file in (("--json", target), ("-o", output)) if file is not None}
    as_json = json_target is not None
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or Path(model).suffix in o.WEIGHTS):
        raise MergeidError(f"no such file or folder: {model}; expected {o.MODEL}, or an architecture's name")
    if why is not None:
        parse_axis(why)
    with working(as_json) as work:
        work.progress("tracing and verifying" if given is None else "verifying", 0, 0)
        found = call(model, graph=given)
        answer = explain(found, why) if why is not None else None
        for option, file in files.items():
            write_whole(file, to_text(found.to_json() if answer is None else answer, indent=None) + "\n", option)
        if json_target == "-":
            work.emit(found.to_json() if answer is None else answer, indent=None)
        elif answer is not None and not as_json:
            work.say("\n".join(answer["text"]))
        elif not as_json:
            from mergeid.reporting.show_graph import print_graph

            work.close()
            print_graph(found, work.console, every=every)
        if files:
            work.note("wrote " + ", ".join(map(str, files.values())))
    return 0


def spell_out_json(args: Sequence[str], command: Any) -> list[str]:
    """``--json`` may stand alone or take a file; options of the parser below cannot do both.

    It takes the next word unless that is an option, or is the only one left to name the model."""
    valued = {o for p in command.params if not getattr(p, "is_flag", False) for o in p.opts if o.startswith("-")}
    words = list(args)
    for i, word in enumerate(words):
        if word == "--":
            break
        if word == "--json":
            following = words[i + 1 : i + 2]
            others = [*words[:i], *words[i + 2 :]]
            takes = following and (following[0] == "-" or not following[0].startswith("-"))
            if takes and _positional(others, valued):
                return [*words[:i], f"--json={following[0]}", *words[i + 2 :]]
            return [*words[:i], "--json=-", *words[i + 1 :]]
    return words


def _positional(words: Sequence[str], valued: set[str]) -> bool:
    """Whether one of the words is neither an option nor the value of one."""
    after = ["", *words]
    return any(not w.startswith("-") and b not in valued for b, w in zip(after, words, strict=False))


def parse_axis(text: str) -> tuple[str, int]:
    """``"conv1.weight[1]"`` as ("conv1.weight", 1). Raises `MergeidError` for anything else."""
    match = re.fullmatch(r"(.+)\[(\d{1,9})\]", text.strip())
    if match is None:
        raise MergeidError(f"--why {text!r} is not an axis; expected TENSOR[AXIS], such as 'conv1.weight[1]'")
    return match[1], int(match[2])


def explain(graph: NeuronGraph, axis: str) -> dict[str, Any]:
    """What an axis belongs to.

    Args:
        axis: ``tensor[axis]``.

    Returns:
        ``{"tensor", "axis", "size", "spaces": [{"id", "label", "positions", "group", "also"}], "frozen": why or None,
        "text": the same in sentences}``

    Raises:
        MergeidError: no such tensor or axis.
    """
    from mergeid.plugins import near_names
    from mergeid.reporting.show_graph import places

    tensor, number = parse_axis(axis)
    shape = graph.tensors.get(tensor)
    if shape is None:
        near = near_names(tensor, graph.tensors, 3)
        hint = f"did you mean {', '.join(near)}" if near else f"expected one of its {len(graph.tensors)} tensors"
        raise MergeidError(f"--why {axis!r}: {graph.model} has no tensor {tensor!r}; {hint}")
    if number >= len(shape):
        raise MergeidError(f"--why {axis!r}: {tensor!r} has shape {list(shape)}; expected an axis below {len(shape)}")
    spaces: list[dict[str, Any]] = []
    text: list[str] = []
    for space, where in graph.on_tensor.get(tensor, []):
        if where.axis != number:
            continue
        positions = int((where.index >= 0).sum())
        also = places([(a.tensor, a.axis) for a in space.axes if (a.tensor, a.axis) != (tensor, number)], graph.tensors)
        spaces.append(
            {"id": space.id, "label": space.label, "positions": positions, "group": space.group, "also": also}
        )
        text.append(
            f"{tensor}[{number}]: {positions} of {shape[number]} positions belong to space {space.id} "
            f"({space.label}), group {space.group}, which also acts on {', '.join(also) or 'no other axis'}."
        )
    frozen = next((why for t, a, why in graph.frozen if (t, a) == (tensor, number)), None)
    if frozen is not None:
        left = shape[number] - sum(s["positions"] for s in spaces)
        text.append(f"{tensor}[{number}]: {left} of {shape[number]} positions are frozen ({frozen}).")
    return {
        "tensor": tensor,
        "axis": number,
        "size": shape[number],
        "spaces": spaces,
        "frozen": frozen,
        "text": text or [f"{tensor}[{number}] has no position that can be permuted."],
    }
