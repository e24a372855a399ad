"""Where an output may be written: checked before any work, and without touching anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from mergeid.errors import MergeidError
from mergeid.io.weights import INDEX, PICKLES, SAFETENSORS

RECORD = "mergeid.json"
"""Name of the record that is written beside (or into) every output."""


def is_single_file(output: str | os.PathLike[str]) -> bool:
    """Whether an output path means one file (``*.safetensors``) rather than a folder."""
    return os.fspath(output).endswith(SAFETENSORS)


def check_output(output: str | os.PathLike[str], *, inputs: Iterable[Path] = (), force: bool = False) -> Path:
    """The place that will be written, links resolved.

    Args:
        output: a ``.safetensors`` file or a folder.
        inputs: files and folders that are read; none of them may be overwritten, even with `force`.
        force: whether an earlier output there may be replaced.

    Raises:
        MergeidError: it exists and `force` is off, is an input, lies in no folder or in one that cannot be
            written, has a wrong ending, or is a folder that does not look like a model's.
    """
    name = os.fspath(output)
    if name.endswith((*PICKLES, ".json")):
        raise MergeidError(f"output {name} has a wrong ending; expected a .safetensors file or a folder (option -o)")
    final = Path(os.path.realpath(Path(name).expanduser()))
    for given in inputs:
        if _same(final, given):
            raise MergeidError(
                f"output {name} is the same {'folder' if given.is_dir() else 'file'} as the input {given}; "
                "choose another name (option -o)"
            )
    parent = final.parent
    if not parent.is_dir():
        raise MergeidError(f"output folder {parent} does not exist; create it, or choose another place (option -o)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MergeidError(f"output folder {parent} is not writable; choose another place (option -o)")
    if final.exists():
        _check_existing(name, final, list(inputs), force)
    return final


def check_place(path: Path, option: str) -> None:
    """Of a file that holds no weights. Raises `MergeidError` where there can be none of that name."""
    if path.is_dir():
        raise MergeidError(f"{option} {path} is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise MergeidError(f"{option} {path}: its folder does not exist; create {path.parent} or choose another place")


def _same(final: Path, given: Path) -> bool:
    """Also through symbolic and hard links."""
    try:
        return os.path.samefile(final, given)
    except OSError:
        return final == Path(os.path.realpath(given))


def _check_existing(name: str, final: Path, inputs: list[Path], force: bool) -> None:
    if is_single_file(final) and final.is_dir():
        raise MergeidError(f"output {name} is a folder; expected the name of a new file (option -o)")
    if not is_single_file(final) and not final.is_dir():
        raise MergeidError(f"output {name} is a file; expected a folder or a name that ends in .safetensors")
    if final.is_dir() and not any(final.iterdir()) and not _same(final, Path.cwd()):
        return
    if not force:
        raise MergeidError(f"output {name} exists already; choose another name (option -o) or pass --force")
    if not final.is_dir():
        return
    for given in [*inputs, Path.cwd()]:
        if final in [Path(os.path.realpath(given)), *Path(os.path.realpath(given)).parents]:
            raise MergeidError(
                f"output folder {name} cannot be replaced: {given} lies in it; choose another name (option -o)"
            )
    inside = {p.name for p in final.iterdir()}
    if not inside & {RECORD, "config.json", "model" + SAFETENSORS, "model" + INDEX}:
        raise MergeidError(
            f"output folder {name} is not a model folder (no {RECORD}, config.json or model.safetensors in it), "
            "so --force does not replace it; choose another name, or remove it yourself"
        )


def record_path(final: Path) -> Path:
    """Where the record of an output goes: into its folder, or beside its file.

    A ``mergeid.json`` that tells of another output is not lost: then it is ``<stem>.mergeid.json``.
    """
    if not is_single_file(final):
        return final / RECORD
    beside = final.parent / RECORD
    if not beside.exists():
        return beside
    try:
        mine = json.loads(beside.read_text(encoding="utf-8")).get("output") == final.name
    except (OSError, ValueError, AttributeError):
        mine = False
    return beside if mine else final.parent / f"{final.stem}.{RECORD}"
