"""Will these two models merge, and how?

    import mergeid

    plan = mergeid.plan("a.safetensors", "b.safetensors", data="images/")
    result = mergeid.merge("a.safetensors", "b.safetensors", output="merged.safetensors", data="images/")

Nothing heavy is imported until one of the names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, MergeidWarning, WillNotMerge

if TYPE_CHECKING:
    from mergeid.matchers.protocol import Matcher, MatchTask, register_matcher
    from mergeid.methods.registry import MergeMethod, register_method
    from mergeid.neuron_graph.neuron_graph import NeuronGraph
    from mergeid.request.vocabulary import TokenRow, Vocabulary
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.estimate import Estimate
    from mergeid.results.extract import ExtractResult
    from mergeid.results.merge import MergeResult, ScrambleResult
    from mergeid.results.plan import Plan
    from mergeid.results.prediction import PredictionMatrix, PredictResult
    from mergeid.results.ranking import Ranking
    from mergeid.results.similarity import SimilarityResult
    from mergeid.results.soup import SoupResult
    from mergeid.results.zip import ZipResult
    from mergeid.verbs.align import align
    from mergeid.verbs.barrier import barrier
    from mergeid.verbs.estimate import estimate
    from mergeid.verbs.extract import extract
    from mergeid.verbs.graph import graph
    from mergeid.verbs.load import load
    from mergeid.verbs.merge import merge
    from mergeid.verbs.moe import moe
    from mergeid.verbs.plan import plan
    from mergeid.verbs.predict import predict
    from mergeid.verbs.rank import rank
    from mergeid.verbs.report import report
    from mergeid.verbs.scramble import scramble
    from mergeid.verbs.similarity import similarity
    from mergeid.verbs.sketch import predict_sketches, sketch
    from mergeid.verbs.soup import soup
    from mergeid.verbs.zip import load_zipped, zip_models

    __version__: str

_PLACES = {
    "Estimate": "results.estimate",
    "ExtractResult": "results.extract",
    "BarrierResult": "results.barrier",
    "MatchTask": "matchers.protocol",
    "Matcher": "matchers.protocol",
    "MergeMethod": "methods.registry",
    "MergeResult": "results.merge",
    "NeuronGraph": "neuron_graph.neuron_graph",
    "Plan": "results.plan",
    "PredictResult": "results.prediction",
    "PredictionMatrix": "results.prediction",
    "Ranking": "results.ranking",
    "ScrambleResult": "results.merge",
    "SimilarityResult": "results.similarity",
    "SoupResult": "results.soup",
    "TokenRow": "request.vocabulary",
    "Vocabulary": "request.vocabulary",
    "ZipResult": "results.zip",
    "align": "verbs.align",
    "barrier": "verbs.barrier",
    "estimate": "verbs.estimate",
    "graph": "verbs.graph",
    "load": "verbs.load",
    "load_zipped": "verbs.zip",
    "merge": "verbs.merge",
    "moe": "verbs.moe",
    "plan": "verbs.plan",
    "predict": "verbs.predict",
    "rank": "verbs.rank",
    "predict_sketches": "verbs.sketch",
    "register_matcher": "matchers.protocol",
    "register_method": "methods.registry",
    "report": "verbs.report",
    "extract": "verbs.extract",
    "scramble": "verbs.scramble",
    "similarity": "verbs.similarity",
    "soup": "verbs.soup",
    "sketch": "verbs.sketch",
    "zip_models": "verbs.zip",
}
"""Where the names lie that are imported when they are used."""

__all__ = [
    "BarrierResult",
    "Estimate",
    "ExtractResult",
    "MatchTask",
    "Matcher",
    "MergeMethod",
    "MergeResult",
    "MergeidError",
    "MergeidWarning",
    "NeuronGraph",
    "Plan",
    "PredictResult",
    "PredictionMatrix",
    "Ranking",
    "ScrambleResult",
    "SimilarityResult",
    "SoupResult",
    "TokenRow",
    "Vocabulary",
    "WillNotMerge",
    "ZipResult",
    "align",
    "barrier",
    "estimate",
    "extract",
    "graph",
    "load",
    "load_zipped",
    "merge",
    "moe",
    "plan",
    "predict",
    "predict_sketches",
    "rank",
    "register_matcher",
    "register_method",
    "report",
    "scramble",
    "similarity",
    "sketch",
    "soup",
    "zip_models",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"mergeid.{_PLACES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("mergeid")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, "__version__"})
