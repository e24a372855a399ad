"""Several checkpoints in one folder, which appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergeid.basics import stopping
from mergeid.basics.reading import json_text
from mergeid.errors import MergeidError
from mergeid.io.output import RECORD, check_output
from mergeid.io.publish import cannot_write, hidden, publish_folder, sync_folder, write_text


def write_together(
    output: str | os.PathLike[str],
    parts: Mapping[str, Callable[[Path], object]],
    *,
    record: Mapping[str, Any],
    inputs: Iterable[Path] = (),
    force: bool = False,
) -> list[Path]:
    """Write a folder with one subfolder per part and a record (``mergeid.json``).

    Args:
        output: the folder.
        parts: name of the subfolder -> what writes it, given its (temporary) path.
        record: of all parts; the key ``output`` is added.
        inputs: files and folders that are read, and must not be overwritten.
        force: replace an earlier output.

    Returns:
        The files of the output, in order.

    Raises:
        MergeidError: the output cannot be written; nothing was left behind.
    """
    given = list(inputs)
    final = check_output(output, inputs=given, force=force)
    staged = hidden(final)
    try:
        staged.mkdir()
        for name, write in parts.items():
            write(staged / name)
        write_text(staged / RECORD, json_text({**record, "output": final.name}) + "\n")
        sync_folder(staged)
        check_output(output, inputs=given, force=force)  # it may have appeared meanwhile
        publish_folder(staged, final)
        sync_folder(final.parent)
    except OSError as error:
        raise MergeidError(cannot_write(error, output, "-o")) from None
    finally:
        stopping.remove(staged)
    return sorted(p for p in final.rglob("*") if p.is_file())
