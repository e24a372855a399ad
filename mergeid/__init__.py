"""Will these two models merge, and how?

    import mergeid

    plan = mergeid.plan("a.safetensors", "b.safetensors", data="images/")
    result = mergeid.merge("a.safetensors", "b.safetensors", output="merged.safetensors", data="images/")

Nothing heavy is imported until one of the verbs is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, MergeidWarning, WillNotMerge

if TYPE_CHECKING:
    from mergeid.verbs.api import align as align
    from mergeid.verbs.api import barrier as barrier
    from mergeid.verbs.api import graph as graph
    from mergeid.verbs.api import load as load
    from mergeid.verbs.api import load_zipped as load_zipped
    from mergeid.verbs.api import merge as merge
    from mergeid.verbs.api import plan as plan
    from mergeid.verbs.api import predict as predict
    from mergeid.verbs.api import predict_sketches as predict_sketches
    from mergeid.verbs.api import scramble as scramble
    from mergeid.verbs.api import similarity as similarity
    from mergeid.verbs.api import sketch as sketch
    from mergeid.verbs.api import zip_models as zip_models

    __version__: str

VERBS = (
    *("load", "graph", "plan", "predict", "align", "merge", "barrier", "scramble", "similarity"),
    *("sketch", "predict_sketches", "zip_models", "load_zipped"),
)
__all__ = [
    "MergeidError",
    "MergeidWarning",
    "WillNotMerge",
    "align",
    "barrier",
    "graph",
    "load",
    "load_zipped",
    "merge",
    "plan",
    "predict",
    "predict_sketches",
    "scramble",
    "similarity",
    "sketch",
    "zip_models",
]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        from mergeid.verbs import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("mergeid")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *VERBS, "__version__"})


class _Verb(ModuleType):
    """A subpackage that bears the name of a verb: calling ``mergeid.merge`` means the verb, always."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from mergeid.verbs import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing mergeid.combine.apply binds the subpackage mergeid.merge over the function of that name.
        if name in VERBS and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
