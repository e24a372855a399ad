"""Open: models that can be merged, compared by their headers, heads and configs; then pairs of them, loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.tensor_plan import mergeable, plan_many, plan_tensors
from mergeid.errors import MergeidError, NoModel
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dequantise import refuse_quantised
from mergeid.io.lora import refuse_adapter
from mergeid.io.opening import Source, is_live, of_one_wrapping, values_of
from mergeid.models.architecture import check_named
from mergeid.models.beside import differences_beside
from mergeid.models.both_heads import JoinedHead, both_heads
from mergeid.models.chat_templates import with_chat_template
from mergeid.models.configs import CHANGES, SAYS_WHICH, Agreed, Disagreement, agree, called_apart
from mergeid.models.heads import SameHeads, same_heads
from mergeid.models.names import same_names
from mergeid.models.sizes import same_sizes
from mergeid.models.vocabularies import one_vocabulary
from mergeid.request.request import Matching, Output

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.models.loaded import Loaded
    from mergeid.models.workbench import Workbench
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


@dataclass(frozen=True)
class Met:
    """Models that can be merged tensor by tensor, as far as names, configs and heads say.

    Attributes:
        bench: where they were opened.
        models, base: what is loaded: live modules as they are, else with the same heads and configs.
        agreed: all of them with the same heads and configs, and what was overruled.
        skip: the globs that still say something.
        joined: the head with the classes of all, where that is asked for.
    """

    bench: Workbench
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    agreed: Agreed
    skip: tuple[str, ...]
    joined: JoinedHead | None = None

    @property
    def live(self) -> bool:
        return is_live(self.models[0])

    @property
    def others(self) -> dict[str, Any]:
        """Of live modules: what is no tensor in the state dict of the one whose code counts."""
        from mergeid.basics.state import others_of

        module = self.models[1 if self.bench.reading.config == "b" else 0].module
        return {} if module is None else others_of(module)

    def with_joined(self, first: Loaded) -> Loaded:
        """The first model, loaded, which knows of the joined head."""
        return first if self.joined is None else replace(first, joined=self.joined)

    @property
    def everyone(self) -> list[Checkpoint]:
        """The models and, last, the base."""
        return [*self.models, *([self.base] if self.base is not None else [])]

    @property
    def notes(self) -> list[str]:
        """What the user of a merge should know: what was done so that the models meet, and small files in which they
        differ and of which the output has the first one's."""
        asked = self.bench.reading
        tokens, template = asked.tokenizer is not None, asked.chat_template is not None
        return [*self.agreed.notes, *differences_beside(self.models, tokens=tokens, template=template)]

    @property
    def float_names(self) -> list[str]:
        """Names of the tensors that settings speak of: the first model's, those that are merged."""
        added = self.joined.tensors if self.joined is not None else ()
        names = [n for n in mergeable(self.agreed.models[0]) if n not in added]
        return [n for n in names if not any(fnmatchcase(n, p) for p in self.skip)]


@dataclass(frozen=True)
class Pair:
    """Attributes:
    a, b: as networks that compute one function of their weights.
    graph: what permutes with what in both.
    """

    a: Loaded
    b: Loaded
    graph: NeuronGraph

    def weights(self) -> tuple[NeuronGraph, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The graph and both state dicts in real numbers."""
        from mergeid.neuron_graph.reals import in_reals

        graph, (a, b) = in_reals(self.graph, self.a.state(), self.b.state())
        return graph, a, b


def open_models(
    bench: Workbench,
    models: Sequence[Source],
    base: Source | None = None,
    *,
    widths: bool = True,
    heads: bool = True,
) -> Met:
    """Open all models, give them the same heads, and compare their configs. Nothing is built for models of equal
    configs and names.

    Args:
        widths: whether layers must be of equal widths; else the caller compares the tensors' names and shapes.
        heads: whether the task heads are merged too.

    Raises:
        MergeidError: adapters instead of models, heads that contradict their config, configs that differ.
    """
    asked, sources = bench.reading, [*models, *([base] if base is not None else [])]
    sources, unwrapped = of_one_wrapping(sources)
    opened = [bench.open(source) for source in sources]
    for checkpoint in opened:
        refuse_adapter(checkpoint)
        refuse_quantised(checkpoint, [])  # before names that no network has are left out
        if checkpoint.module is not None:
            checkpoint.check_values()
    check_named(opened[0], asked.arch)
    named = same_names(opened, asked.arch)
    sized = same_sizes(named.models, asked, len(models))
    given = same_heads(sized.models, asked.skip) if heads else SameHeads(sized.models)
    both = both_heads(given.models, asked, base is not None)
    words = one_vocabulary(both.models, asked.tokenizer, base is not None)
    everyone = with_chat_template(words.models, asked.chat_template, opened)
    left = {name for c in everyone for name in c.table}
    skip = tuple(
        p
        for p in asked.skip
        if any(fnmatchcase(n, p) for n in left) or not any(fnmatchcase(n, p) for n in given.dropped | named.dropped)
    )
    origin = everyone.pop() if base is not None else None
    if widths:  # other architectures are called so, and not configs that differ
        plan_many(everyone, base=origin, skip=skip)
    agreed = agree(
        everyone,
        origin,
        config=asked.config,
        same_head=heads and not skip,
        widths=widths,
        arch=asked.arch,
        layers=not skip,
    )
    said = [*unwrapped, *named.notes, *sized.notes, *given.notes, *both.notes, *words.notes, *agreed.notes]
    agreed = replace(agreed, resized=sized.resized, heads=both.to_json(), notes=said)
    if opened[0].module is None:
        return Met(bench, tuple(agreed.models), agreed.base, agreed, skip, both.joined)
    return Met(bench, tuple(opened[: len(models)]), opened[-1] if base is not None else None, agreed, skip)


def pair_of(met: Met, other: Checkpoint, dtype: str | None = None) -> Pair:
    """The first model and another, loaded, with their common graph.

    Args:
        other: one of the models, or the base.
        dtype: number format that the merge would be written in.

    Raises:
        NoModel: no model can be built of files.
        MergeidError: tensors that do not fit, or are not finite; kinds that differ.
    """
    bench, first = met.bench, met.models[0]
    if is_live(first) != is_live(other):
        raise MergeidError("one model is a live module and the other a path; load the path into a module first")
    check_tensors(met, other, dtype)
    if met.live:
        one = bench.load(first)
        two = bench.load(other, one)
        if met.agreed.chosen is not None or _differ(one, two, bench):
            one, two = _in_one_class(one, two, bench.reading.config == "b")
        graph = bench.common_graph(one, two)
    else:
        try:
            one = bench.load(first)
            two = bench.load(other, one)
            graph = bench.common_graph(one, two)
        except MergeidError as error:
            raise NoModel(str(error)) from error
    return Pair(met.with_joined(one), two.apart_from(one), unskipped(graph, one, met.skip))


def check_tensors(met: Met, other: Checkpoint, dtype: str | None = None) -> None:
    """The first model's tensors and another's compared by their headers, and read for what is not finite, before
    anything is built. Raises `MergeidError`."""
    from mergeid.combine.by_torch import check_finite

    first = met.models[0]
    tensors = plan_tensors(first, other, skip=met.skip, dtype=dtype)
    for checkpoint in (first, other):
        met.bench.once(("finite", id(checkpoint), tensors.merged), partial(check_finite, checkpoint, tensors.merged))


def unskipped(graph: NeuronGraph, loaded: Loaded, skip: Sequence[str]) -> NeuronGraph:
    """The graph without the tensors that --skip takes from A."""
    keys = skipped_keys(loaded, skip)
    return graph.on_tensors([t for t in graph.tensors if t not in keys]) if keys else graph


def skipped_keys(loaded: Loaded, skip: Sequence[str]) -> set[str]:
    """Keys of the model's state dict whose tensors --skip takes from A as they are."""
    from mergeid.stages.members import skipped_in

    return skipped_in(loaded.state(), loaded.called, skip)


def origin_of(met: Met, base: Source, like: Loaded) -> dict[str, Tensor]:
    """The weights that the models were fine-tuned from, under the keys of `like`'s state dict; where a config was
    chosen by name, it is that of `like` that counts.

    Raises `MergeidError` where it is no checkpoint of the same architecture."""
    bench, first = met.bench, met.models[0]
    if is_live(base) != met.live:
        raise MergeidError(
            "the base is a live module and the models are paths, or the reverse; expected only modules, or only paths"
        )
    origin = bench.open(base)
    here = {*first.table, *origin.table}
    skip = tuple(p for p in met.skip if any(fnmatchcase(n, p) for n in here))
    chosen = "a" if bench.reading.config is not None else None
    both = open_models(bench.under(replace(bench.reading, skip=skip, config=chosen)), [first, base])
    check_tensors(both, both.models[1])
    if origin.module is not None:
        return values_of(origin.module)
    return bench.load(both.models[1], like).state()


def check_matching(matching: Matching, data: bool) -> None:
    """Raises `MergeidError`, before long work, for a matcher that is unknown or cannot do what is asked."""
    if matching.matcher is not None:
        from mergeid.matchers.protocol import check_matcher

        check_matcher(matching.matcher, matching.mode, data)


def output_path(output: Output, reads: Sequence[Any], default: str = "merged") -> Path:
    """Where the output goes: beside the working directory's files, of the first model's kind, if it has no name.

    Args:
        reads: all that is read, models first; none of it may be touched.
        default: its name, if none is given.

    Raises `MergeidError` where it cannot be written."""
    from mergeid.io.output import check_output, default_name

    path = output.path
    if path is None:
        first = reads[0]
        if isinstance(first, (str, os.PathLike)):
            path = default_name(first, default)
        else:
            path = default if isinstance(first, Checkpoint) and first.is_folder else f"{default}.safetensors"
    return check_output(path, inputs=[x for x in reads if isinstance(x, (str, os.PathLike))], force=output.force)


def _differ(one: Loaded, two: Loaded, bench: Workbench) -> bool:
    """Whether two live models compute different things with the same weights, and the user says whose code counts.

    Raises `MergeidError` where that is not said."""
    from mergeid.models.live import code_difference

    found = bench.kept(("code", id(one), id(two)), (one, two), lambda: code_difference(one, two))
    if found is None or bench.reading.config is not None:
        return found is not None
    raise MergeidError(f"{Disagreement(*called_apart(one, two), tuple(found))}, {CHANGES}; --config a|b {SAYS_WHICH}")


def _in_one_class(one: Loaded, two: Loaded, second: bool) -> tuple[Loaded, Loaded]:
    """Both live models as the one whose config was chosen computes, each with its own weights."""
    from mergeid.basics.state import load_weights

    chosen, other = (two, one) if second else (one, two)
    model = copy.deepcopy(chosen.model)
    load_weights(model, other.state())
    changed = replace(other, model=model)
    return (changed, two) if second else (one, changed)
