"""Where an output may be written: checked before any work. No output may touch an input, whatever option names it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from mergeid.basics import stopping
from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError, reason
from mergeid.io.folders import INDEX, PICKLES, SAFETENSORS

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where the disk, a quota or a size limit is full."""

_READ_BESIDE = re.compile(
    r"(config|tokenizer|vocab|tokenizer_config|special_tokens_map|added_tokens|\w*processor_config|adapter_config|"
    r"generation_config|modules|.*\.index)\.json|(vocab|merges)\.txt|.*\.model"
)
"""Files that may be read where a file of weights lies beside them."""

_FILES = (".json", ".yaml", ".yml", ".txt", ".html", ".gguf", ".onnx", ".h5", ".npz", ".zip")
"""Endings of what people take for files, and never for folders of weights."""

Input = str | os.PathLike[str]
"""Something that is read: a file, a folder, or a name that is neither (a hub id, a function)."""

RECORD = "mergeid.json"
"""Name of the record that is written beside (or into) every output."""


def is_single_file(output: str | os.PathLike[str]) -> bool:
    """Whether an output path means one file (``*.safetensors``) rather than a folder."""
    return os.fspath(output).endswith(SAFETENSORS)


def default_name(first: str | os.PathLike[str], stem: str = "merged") -> str:
    """The output of models of which this is the first, where it is given no name: a file for a file, else a folder."""
    return f"{stem}{SAFETENSORS}" if os.fspath(first).endswith((SAFETENSORS, *PICKLES)) else stem


def free_name(first: str | os.PathLike[str]) -> str:
    """A name of that kind which nothing has yet: merged, merged-2, …"""
    names = (default_name(first, "merged" if i == 1 else f"merged-{i}") for i in count(1))
    return next(name for name in names if not Path(name).exists())


def check_output(output: str | os.PathLike[str], *, inputs: Iterable[Input] = (), force: bool = False) -> Path:
    """The place that will be written, links resolved.

    Args:
        output: a ``.safetensors`` file or a folder.
        inputs: files and folders that are read (names that are neither count nothing); none of them, nor what lies in
            them, may be overwritten, even with `force`.
        force: whether an earlier output there may be replaced.

    Raises:
        MergeidError: it exists and `force` is off, is an input, lies in no folder or in one that cannot be
            written, has a wrong ending, or is a folder that does not look like a model's.
    """
    name = os.fspath(output)
    if not name:
        raise MergeidError("the output has no name; expected a .safetensors file or a folder (option -o)")
    lower = name.lower()
    if lower.endswith((*PICKLES, *_FILES)) or (lower.endswith(SAFETENSORS) and not is_single_file(name)):
        raise MergeidError(f"output {name} has a wrong ending; expected a .safetensors file or a folder (option -o)")
    final = _resolved(name, "output")
    given = _paths(inputs)
    _check_untouched(final, f"output {name}", given, " (option -o)")
    _check_folder(final.parent, "output")
    if os.path.lexists(final):
        _check_existing(name, final, given, force)
    return final


def check_files(outputs: Mapping[str, Path | None], inputs: Iterable[Input | None] = ()) -> None:
    """Of files that hold no weights: to be called before long work.

    Args:
        outputs: option -> the file that it names; None: not given.
        inputs: files and folders that are read, and names that are neither.

    Raises:
        MergeidError: one is an input or lies in one, is another output too, or is a place where no file can be written.
    """
    given, taken = _paths(i for i in inputs if i is not None), dict[Path, str]()
    for option, path in outputs.items():
        if path is None:
            continue
        what = f"{option} {path}"
        final = _resolved(os.fspath(path), option)
        if final.name.endswith((SAFETENSORS, *PICKLES)):
            ending = ".html" if option == "--report" else ".json"
            raise MergeidError(f"{what} has the ending of a weight file; expected a name such as {path.stem}{ending}")
        _check_untouched(final, what, given)
        owner = next((i for i in given if _would_be_part(final, i)), None)
        if owner is not None:
            raise MergeidError(f"{what} would be read as a part of the input {owner}; choose another name")
        if final.is_dir():
            raise MergeidError(f"{what} is a folder; expected the name of a file")
        if final.exists() and not final.is_file():
            raise MergeidError(f"{what} is a pipe or a device; expected the name of a file (--json alone prints)")
        if final in taken:
            raise MergeidError(
                f"{what} is also the file given with {taken[final]}; choose another name for one of them"
            )
        taken[final] = option
        _check_folder(final.parent, what)


def check_new(outputs: Mapping[str, Path | None]) -> None:
    """Raises `MergeidError` for a file that exists already, unless nothing is in it.

    Args:
        outputs: as for `check_files`, which looks at them first."""
    for option, path in outputs.items():
        if path is not None and (final := Path(os.path.expanduser(path))).is_file() and final.stat().st_size:
            raise MergeidError(
                f"output {path} exists already; choose another name (option {option}) or pass --force to replace it"
            )


def _resolved(name: str, what: str) -> Path:
    """Where an output really lies. Raises `MergeidError` for what cannot be the name of a file."""
    try:
        final = Path(os.path.realpath(Path(name).expanduser()))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(final)
    except FileNotFoundError:
        raise MergeidError(
            f"{what} {name} cannot be written: the working directory is gone; change to another one"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise MergeidError(f"{what} {name} cannot be written: {reason(error)}; choose another place") from None
    if not final.name:
        raise MergeidError(f"{what} {name or repr(name)} is not a file name; choose another place")
    return final


def _paths(inputs: Iterable[Input]) -> list[Path]:
    """Those inputs that lie on this machine."""
    found = (Path(os.path.expanduser(given)) for given in inputs)  # which leaves the home of nobody as it is
    return [path for path in found if os.path.exists(path)]


def _check_untouched(final: Path, what: str, inputs: list[Path], option: str = "") -> None:
    """Also through symbolic and hard links."""
    other = f"choose another name{option}"
    for given in inputs:
        real = Path(os.path.realpath(given))
        if final == real or _same(final, real):
            kind = "folder" if given.is_dir() else "file"
            raise MergeidError(f"{what} is the same {kind} as the input {given}; {other}")
        if is_single_file(final) and real in final.parents and _holds_weights(final.parent):
            raise MergeidError(
                f"{what} would be a second file of weights in the input folder {given}; {other}, or another place"
            )
        if not final.exists():
            continue
        if real.is_dir() and real in final.parents and not (final / RECORD).is_file():
            raise MergeidError(f"{what} is inside the input folder {given}; {other}, or another place")
        if real.is_file() and final.parent == real.parent and _READ_BESIDE.fullmatch(final.name):
            raise MergeidError(f"{what} belongs to the input {given}; {other}")


def _would_be_part(final: Path, given: Path) -> bool:
    """Whether a file of that name says something of a model where it lies: of the folder, or of the file beside it."""
    real = Path(os.path.realpath(given))
    if real.is_dir():
        return final.parent == real and bool(final.name == RECORD or _READ_BESIDE.fullmatch(final.name))
    return final.parent == real.parent and bool(_READ_BESIDE.fullmatch(final.name))


def _holds_weights(folder: Path) -> bool:
    """Whether files of weights lie directly in it: which of them count, another one may change."""
    return folder.is_dir() and any(name.endswith((SAFETENSORS, *PICKLES)) for name in os.listdir(folder))


def _check_folder(parent: Path, what: str) -> None:
    """Whether a file can be made in a folder: tried, since permissions alone do not tell."""
    again = "choose another place (option -o)" if what == "output" else "choose another place"
    whose = f"output folder {parent}" if what == "output" else f"{what}: its folder {parent}"
    if not parent.is_dir():
        raise MergeidError(f"{whose} does not exist; create it, or {again}")
    probe = parent / f".{secrets.token_hex(6)}.mergeid-tmp"
    with stopping.uninterrupted():  # a process that is stopped leaves nothing
        try:
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            if error.errno not in FULL:  # how much room there is, is asked later
                raise MergeidError(f"{whose} is not writable; {again}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)


def _same(final: Path, given: Path) -> bool:
    try:
        return os.path.samefile(final, given)
    except OSError:
        return False


def _check_existing(name: str, final: Path, inputs: list[Path], force: bool) -> None:
    if is_single_file(final) and final.is_dir():
        raise MergeidError(f"output {name} is a folder; expected the name of a new file (option -o)")
    if not is_single_file(final) and not final.is_dir():
        raise MergeidError(f"output {name} is a file; expected a folder or a name that ends in .safetensors")
    if final.exists() and not final.is_dir() and not final.is_file():
        raise MergeidError(f"output {name} is a pipe or a device; expected the name of a file or folder (option -o)")
    if final.is_dir() and not any(final.iterdir()) and not _same(final, Path.cwd()):
        return
    if not force:
        raise MergeidError(
            f"output {name} exists already; choose another name (option -o) or pass --force to replace it"
        )
    if not final.is_dir():
        return
    for given in [*inputs, Path.cwd()]:
        if final in [Path(os.path.realpath(given)), *Path(os.path.realpath(given)).parents]:
            raise MergeidError(
                f"output folder {name} cannot be replaced: {given} is in it; choose another name (option -o)"
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
        mine = read_table(beside).get("output") == final.name
    except MergeidError:
        mine = False
    return beside if mine else final.parent / f"{final.stem}.{RECORD}"
