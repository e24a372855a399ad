"""From what the user named to a plan: load the pair and its data, then decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mergeid.models.pair import Pair, Progress, Source, dataset_of, load_base, load_pair

if TYPE_CHECKING:
    from mergeid.neuron_graph.neuron_graph import Element
    from mergeid.stages.plan import Hears, Plan


@dataclass
class Planned:
    """A plan with the pair and the data that it was made from (`dataset` and `collate` are None without data)."""

    plan: Plan
    pair: Pair
    dataset: Any
    collate: Callable[[Any], Any] | None


def plan_pair(
    a: Source,
    b: Source,
    *,
    data: Any,
    arch: str | None,
    match: str,
    seed: int,
    limit: int | None,
    batch_size: int,
    device: str,
    skip: Sequence[str],
    allow_pickle: bool,
    example_inputs: Any,
    progress: Progress | None,
    dtype: str | None = None,
    base: Source | None = None,
    certify: bool = False,
    matcher: str | None = None,
    matched: Element | None = None,
    hears: Hears | None = None,
    config: str | None = None,
) -> Planned:
    """Load both models, what they were fine-tuned from and their data, and decide (`mergeid.stages.plan.make_plan`)."""
    if matcher is not None:
        from mergeid.matchers.protocol import check_matcher

        check_matcher(matcher, match, data is not None)
    pair = load_pair(
        a,
        b,
        arch=arch,
        skip=skip,
        allow_pickle=allow_pickle,
        device=device,
        seed=seed,
        dtype=dtype,
        config=config,
        example_inputs=example_inputs,
        progress=progress,
    )
    origin = None
    if base is not None:
        origin = load_base(
            base, pair.a, arch=arch, skip=skip, allow_pickle=allow_pickle, seed=seed, overruled=config is not None
        )
    dataset, collate = dataset_of(data, pair.a, limit, seed)
    from mergeid.stages.plan import make_plan  # needs torch, which a pair that does not fit never loads

    made = make_plan(
        pair.a,
        pair.b,
        dataset=dataset,
        match=match,
        seed=seed,
        batch_size=batch_size,
        collate=collate,
        graph=pair.graph,
        base=origin,
        certify=certify,
        matcher=matcher,
        matched=matched,
        hears=hears,
        progress=progress,
    )
    made.notes[:0] = pair.agreed.notes
    return Planned(made, pair, dataset, collate)


def common_order(
    first: Source, others: Sequence[Source], *, matcher: str, seed: int, **how: Any
) -> list[Element] | None:
    """The elements that bring the other models into the first one's order through an order common to all; None where
    the matcher only knows pairs. Arguments as for `plan_pair`."""
    from mergeid.matchers.protocol import JointMatcher, get_matcher

    found = get_matcher(matcher)
    if not isinstance(found, JointMatcher):
        return None
    import torch

    from mergeid.matchers.universe import relative

    options = {k: v for k, v in how.items() if k not in ("data", "match", "limit", "batch_size")}
    pairs = [load_pair(first, other, seed=seed, **options) for other in others]
    loaded = [pairs[0].a, *(pair.b for pair in pairs)]
    correlations = judge = None
    dataset, collate = dataset_of(how["data"], loaded[0], how["limit"], seed)
    if dataset is not None:
        from mergeid.evaluate.batches import is_whole
        from mergeid.stages.judge import judge_of
        from mergeid.stages.plan import batches_of, evidence_of

        tell = options["progress"] or (lambda *_: None)
        batches = batches_of(loaded[0], dataset, collate, how["batch_size"], tell)
        correlations = {
            (p, q): evidence_of(
                pairs[0].graph, loaded[p], loaded[q], batches, seed, judged=False, whole=is_whole(dataset)
            ).correlations()
            for p, q in combinations(range(len(loaded)), 2)
        }
        size, device = how["batch_size"], options["device"]
        judge = judge_of(pairs[0].graph, loaded, dataset, collate, batch_size=size, device=device)
    generator = torch.Generator().manual_seed(seed)
    universe = found.match_all(pairs[0].graph, [x.state() for x in loaded], generator, correlations, judge)
    return [relative(universe, 0, i) for i in range(1, len(loaded))]
