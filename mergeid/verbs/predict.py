"""Predict the barrier of a pair: from what the user named to an expected loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.models.loaded import Example
from mergeid.models.pair import LIMIT, Progress, Source, load_base, skipped_keys
from mergeid.request.boundary import verb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.neuron_graph.neuron_graph import Element
    from mergeid.prediction.bound import Bound
    from mergeid.prediction.result import PredictResult
    from mergeid.stages.planned import Planned

TOLERATED = 0.01


@verb
def predict(
    a: Source,
    b: Source,
    *,
    data: Any = None,
    base: Source | None = None,
    tolerate: float = TOLERATED,
    arch: str | None = None,
    config: str | None = None,
    matcher: str | None = None,
    skip: Sequence[str] = (),
    limit: int | None = LIMIT,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    progress: Progress | None = None,
) -> PredictResult:
    """How much two models would lose if they were merged, directly and matched, without merging them.

    No network between the two is run: only A and B, each with its own weights (`mergeid.prediction.lockstep`).

    Args:
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        a, b: files, folders, hub ids, or live modules whose outputs are logits.
        data: inputs of the kind that the models were trained on (labels unused); without them the models are run on
            random inputs, which says less.
        base: what both were fine-tuned from; for the paper's bound.
        config: "a" or "b": whose config counts where they differ in what the network computes.
        tolerate: loss in nats whose probability is asked for.
        limit: most examples that are matched on; at most `mergeid.prediction.probe.EXAMPLES` of them run in lockstep.
        batch_size: of matching; for speed and memory only.

    Raises `MergeidError` for anything wrong with the input, and for models without logits.
    """
    check_tolerated(tolerate)
    from mergeid.prediction.features import EndSums
    from mergeid.prediction.probe import hears
    from mergeid.stages.planned import plan_pair

    ends = EndSums()
    planned = plan_pair(
        a,
        b,
        data=data,
        arch=arch,
        config=config,
        match="always",
        matcher=matcher,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        skip=skip,
        allow_pickle=allow_pickle,
        example_inputs=Example.of(example_inputs, outputs),
        hears=hears(ends),
        progress=progress,
    )
    from mergeid.prediction.lockstep import PathsDiffer
    from mergeid.prediction.model import shipped
    from mergeid.prediction.probe import RandomInputs, probe
    from mergeid.prediction.result import PredictResult, outlook

    plan, pair = planned.plan, planned.pair
    mode = "weights" if data is None else "inputs"
    examples = RandomInputs(pair.a, seed=seed) if planned.dataset is None else planned.dataset
    elements = {"direct": plan.graph.identity()}
    if plan.moves:
        elements["matched"] = plan.element
    first = _plain(pair.a.model, pair.a.state())
    partners = {k: _aligned(planned, e, skip) for k, e in elements.items()}
    tell = progress or (lambda *_: None)
    try:
        found = probe(
            first,
            partners,
            pair.a.forward,
            examples,
            planned.collate,
            ends=None if skip else ends,  # under --skip B is run with A's tensors, and says something else
            progress=lambda done, total: tell("running both models", done, total),
        )
    except PathsDiffer as error:
        raise MergeidError(f"cannot tell: {error}; measure the pair with mergeid barrier") from error
    predictor = shipped()
    outlooks = [
        outlook(predictor, mode, name, repaired, features, e.layers, tolerate)
        for name, e in found.items()
        for repaired, features in ((False, e.plain), (True, e.repaired if data is not None else None))
        if features is not None
    ]
    origin = None
    if base is not None:
        origin = load_base(
            base, pair.a, arch=arch, skip=skip, allow_pickle=allow_pickle, seed=seed, overruled=config is not None
        )
    notes = [n for n in plan.notes if not n.startswith("no calibration data")]
    if data is None:
        notes.append("no --data: both models were run on random inputs, which says less than inputs of their kind")
    if any(not o.nats.trusted for o in outlooks):
        notes.append("part of what was found lies far outside what the predictor was fitted on; there it cannot tell")
    return PredictResult(
        plan.a,
        plan.b,
        plan.arch,
        mode,
        next(iter(found.values())).examples,
        tolerate,
        outlooks,
        _bound(planned, first, partners, origin, examples),
        predictor.version,
        notes,
    )


def check_tolerated(tolerate: float) -> None:
    """Raises `MergeidError` for what is no loss."""
    if not tolerate >= 0 or tolerate == float("inf"):
        raise MergeidError(f"--tolerate must be a loss in nats, 0 or more, got {tolerate:g}")


def _plain(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A network with these weights, ordinary where the model is asymmetric (what is merged are effective weights), and
    in float32 where they are shorter: the deviations of near models would drown in rounding."""
    import torch

    from mergeid.models.state import load_weights
    from mergeid.nn.folding import fold_module, fold_state
    from mergeid.nn.names import asymmetric_parameters, gates

    net = copy.deepcopy(model)
    if asymmetric_parameters(state) and not gates(state):
        net, state = fold_module(net), fold_state(state)
    load_weights(net, state)
    short = any(p.dtype in (torch.bfloat16, torch.float16) for p in net.parameters())
    return net.float() if short else net


def _aligned(planned: Planned, element: Element, skip: Sequence[str]) -> nn.Module:
    """B in A's order; what the merge would take from A as it is comes from A."""
    pair = planned.pair
    skipped = skipped_keys(pair.a, skip)
    state = {k: v for k, v in planned.plan.graph.apply_state(element, pair.b.state()).items() if k not in skipped}
    return _plain(pair.a.model if skipped else pair.b.model, {**state, **{k: pair.a.state()[k] for k in skipped}})


def _bound(
    planned: Planned, first: nn.Module, partners: dict[str, nn.Module], origin: dict[str, Tensor] | None, examples: Any
) -> Bound:
    """The paper's bound, of the pair as it lies: a shared fixed part is shared in that order only."""
    import torch

    from mergeid.evaluate.batches import input_dtype, to_model
    from mergeid.nn.names import FIXED, asymmetric_parameters
    from mergeid.prediction.bound import chord_bound, no_bound

    state = planned.pair.a.state()
    if origin is None:
        names = asymmetric_parameters(state)
        if not names or any(n + FIXED not in state for n in names):
            return no_bound()
        origin = {**state, **{n: torch.zeros_like(state[n]) for n in names}}
    fixed = _plain(planned.pair.a.model, origin)
    join = planned.collate or torch.utils.data.default_collate
    raw = join([examples[i] for i in range(min(32, len(examples)))])
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    batch = planned.pair.a.inputs_of(to_model(raw, device, input_dtype(first)))
    return chord_bound(first, partners["direct"], fixed, planned.pair.a.forward, batch)
