"""What the installed transformers has, read off its files: importing it takes seconds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def has_type(name: str) -> bool:
    """Whether there is a model type of that name. Not all that there are have a file of their own."""
    if not name.replace("-", "_").isidentifier():
        return False
    spec, module = find_spec("transformers"), name.replace("-", "_")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(folder, "models", module, f"configuration_{module}.py")
        try:
            if f'model_type = "{name}"' in file.read_text(encoding="utf-8"):
                return True
        except OSError:
            continue
    return False
