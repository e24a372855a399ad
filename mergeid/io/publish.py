"""How a finished output takes its place: written under a hidden name beside it, on the disk before it is renamed, whole
or not at all. Whatever mergeid writes goes through here, so that nothing is left behind where it fails or is stopped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mergeid.basics import stopping
from mergeid.errors import MergeidError, reason
from mergeid.io.output import FULL


def hidden(final: Path) -> Path:
    """A new hidden name beside an output, to be removed if the process is stopped; short, whatever the output's is."""
    return stopping.note(_beside(final, "tmp"))


def _beside(final: Path, kind: str) -> Path:
    return final.parent / f".{secrets.token_hex(6)}.mergeid-{kind}"


def publish_folder(staged: Path, final: Path) -> None:
    """Rename `staged` to `final`. An earlier output there is set aside, comes back where that fails, and is removed
    only once the new one is in its place."""
    if not final.is_dir() or not any(final.iterdir()):
        os.rename(staged, final)  # onto nothing, or onto an empty folder
        return
    old = _beside(final, "old")
    with stopping.uninterrupted():
        os.rename(final, old)
        try:
            os.rename(staged, final)
        except BaseException:
            os.rename(old, final)
            raise
        stopping.note(old)
    stopping.remove(old)


@contextlib.contextmanager
def whole_file(path: Path, option: str) -> Iterator[Path]:
    """Gives a hidden name to write a file under; leaving the block without an exception puts it at `path`, its links
    followed.

    Args:
        option: what messages call it (``-o``).

    Raises:
        MergeidError: it cannot be written; then nothing is left behind.
    """
    final = Path(os.path.realpath(os.path.expanduser(path)))
    partial = hidden(final)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, final)
        sync_folder(final.parent)
    except OSError as error:
        raise MergeidError(cannot_write(error, path, option)) from None
    finally:
        stopping.remove(partial)


def cannot_write(error: OSError, path: os.PathLike[str] | str, option: str) -> str:
    """One sentence for what the system says to an output."""
    where = f"{option} {os.fspath(path)}".strip()
    if error.errno in FULL:
        return (
            f"disk full (or over a size limit) while writing {where}; nothing was left behind: free some space or "
            "choose another place"
        )
    return f"cannot write {where} ({reason(error)}); nothing was left behind: choose another place"


def write_text(path: Path, text: str | bytes) -> None:
    """Write a whole file, durably, under its final name (inside a folder that is not published yet).

    Raises `MergeidError` for text that UTF-8 cannot hold."""
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise MergeidError(
            f"{path.name} would hold half a character ({error.object[error.start]!a}), which no text file can; remove "
            "it from the model's file that it comes from"
        ) from None
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str, option: str) -> None:
    """Write a text file whole or not at all. Raises `MergeidError` where it cannot be written."""
    with whole_file(path, option) as partial:
        write_text(partial, text)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; some systems cannot open folders, and those need no such call."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
