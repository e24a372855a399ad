"""What the installed diffusers has, read off its files: importing it takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

NETWORKS = ("Model", "UNet", "Autoencoder")
"""What stands in the names of networks that can be named."""


def is_network(name: str) -> bool:
    """Whether a class of diffusers may be called like that."""
    return name.isidentifier() and name[0].isupper() and any(part in name for part in NETWORKS)


def has_network(name: str) -> bool:
    """Whether diffusers hands out a network of that name. Not all that there are are found."""
    if not is_network(name):
        return False
    spec = find_spec("diffusers")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        try:
            listed = f'"{name}"' in Path(folder, "__init__.py").read_text(encoding="utf-8")
            if listed and any("ModelMixin" in bases for bases in _bases(Path(folder, "models"), name)):
                return True
        except OSError:
            continue
    return False


def _bases(folder: Path, name: str) -> Iterator[str]:
    """What classes of that name are made of, as it is written in the files below a folder."""
    pattern = re.compile(rf"^class {name}\(([^)]*)\)", re.MULTILINE)
    for file in sorted(folder.rglob("*.py")):
        yield from pattern.findall(file.read_text(encoding="utf-8"))
