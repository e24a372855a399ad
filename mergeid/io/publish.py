"""How a finished output takes its place: files that are on the disk, and a folder that replaces an earlier one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def publish_folder(staged: Path, final: Path, old: Path) -> None:
    """Rename `staged` to `final`. An earlier output there is set aside as `old`, comes back where that fails, and is
    removed only once the new one is in its place."""
    if not final.is_dir() or not any(final.iterdir()):
        os.rename(staged, final)  # onto nothing, or onto an empty folder
        return
    os.rename(final, old)
    try:
        os.rename(staged, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str | bytes) -> None:
    """Write a whole file, durably."""
    with open(path, "wb") as file:
        file.write(text.encode("utf-8") if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; some systems cannot open folders, and those need no such call."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
