"""Predict the barrier of a pair: from what the user named to an expected loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.errors import MergeidError
from mergeid.io.opening import Source
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.stages.open import Met, Pair, check_matching, open_models, origin_of, pair_of, skipped_keys

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Unpack

    from mergeid.evaluate.agreement import Tally
    from mergeid.models.examples import Examples
    from mergeid.neuron_graph.neuron_graph import Element
    from mergeid.plugins import Batch
    from mergeid.prediction.bound import Bound
    from mergeid.prediction.features import EndSums
    from mergeid.prediction.opinions import Opinions
    from mergeid.prediction.trial import TogetherSums
    from mergeid.prediction.worth import Interference
    from mergeid.results.prediction import PredictResult
    from mergeid.stages.gather import Hears

TOLERATED = 0.01
BOUNDED = 32
"""Examples that the paper's bound is computed on."""
Tolerate = Annotated[
    float, o.Option("Also give the probability that a merge loses at most this much.", o.HOW, "NATS", kind=float)
]
Trial = Annotated[
    bool,
    o.switch(
        "Also make the merges in memory and run them on the data (with its labels, if it has any).", o.HOW, "--try"
    ),
]


@verb
def predict(
    a: Source,
    b: Source,
    *,
    data: o.Data = None,
    base: Annotated[
        Source | None,
        o.Option(
            "Model that A and B were fine-tuned from; adds the bound of arXiv 2606.04754 and the tensors that "
            "interfere.",
            o.INPUT,
            "BASE",
            shown=False,
        ),
    ] = None,
    tolerate: Tolerate = TOLERATED,
    trial: Trial = False,
    matcher: o.Matcher = None,
    batch_size: o.BatchSize = 128,
    **usual: Unpack[Usual],
) -> PredictResult:
    """How much two models would lose if they were merged, directly and matched, without merging them.

    No network between the two is run: only A and B, each with its own weights (`mergeid.prediction.lockstep`).

    Args:
        a, b: files, folders, hub ids, or live modules whose outputs are logits.
        data: inputs of the kind that the models were trained on (labels unused); without them the models are run on
            random inputs, which says less.
        base: what both were fine-tuned from; for the paper's bound.
        tolerate: loss in nats whose probability is asked for.
        trial: also make every merge in memory and run it on the data, with pseudo-labels and, where the data has some,
            with labels; needs `data`.
        batch_size: of matching; for speed and memory only.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`; of the `limit` examples that
            are matched on, at most `mergeid.prediction.probe.EXAMPLES` run in lockstep.

    Raises `MergeidError` for anything wrong with the input, and for models without logits.
    """
    check_tolerated(tolerate)
    run, reading = requests_of(usual, batch_size)
    calibration, matching = calibration_of(data, usual), Matching("always", matcher)
    check_matching(matching, calibration.given)
    met = open_models(Workbench(reading, run), [a, b])
    return predict_pair(met, matching, calibration, base=base, tolerate=tolerate, trial=trial)


def predict_pair(
    met: Met,
    matching: Matching,
    calibration: Calibration,
    *,
    base: Source | None = None,
    tolerate: float = TOLERATED,
    trial: bool = False,
) -> PredictResult:
    """`predict` for models that are open already. Raises as `predict`."""
    if trial and not calibration.given:
        raise MergeidError("--try runs the merges on inputs of the models' kind; name some with --data")
    pair, run = pair_of(met, met.models[1]), met.bench.run
    from mergeid.evaluate.nearness import classifying
    from mergeid.models.loaded import ModuleAdapter
    from mergeid.prediction.features import EndSums
    from mergeid.prediction.opinions import Opinions
    from mergeid.prediction.trial import TogetherSums
    from mergeid.stages.plan import make_plan

    ends, together, opinions = EndSums(), TogetherSums(), Opinions()
    given = met.bench.examples(calibration, pair.a)
    heard, tally = _heard(pair, given, ends, together, opinions)
    plan = make_plan(pair, matching, run, examples=given, hears=heard)
    from mergeid.prediction.lockstep import PathsDiffer
    from mergeid.prediction.model import shipped
    from mergeid.prediction.probe import probe
    from mergeid.prediction.random_inputs import random_examples
    from mergeid.prediction.worth import worth_of
    from mergeid.results.prediction import Finding, PredictResult, TrialReader, outlooks_of
    from mergeid.stages.trial import trials_of

    mode = "inputs" if calibration.given else "weights"
    examples = random_examples(pair.a, run.seed) if given is None else given
    if trial:
        examples = examples.batched("--try")
    elements = {"direct": plan.graph.identity()}
    if plan.moves:
        elements["matched"] = plan.element
    first = _plain(pair.a.model, pair.a.state())
    partners = {k: _aligned(pair, e, met.skip) for k, e in elements.items()}
    try:
        found = probe(
            first,
            partners,
            pair.a.forward,
            examples,
            ends=None if met.skip else ends,  # under --skip B is run with A's tensors, and says something else
            progress=lambda done, total: run.tell("running both models", done, total),
        )
    except PathsDiffer as error:
        raise MergeidError(f"cannot tell: {error}; measure the pair with mergeid barrier") from error
    findings = [Finding(k, e.plain, e.repaired if calibration.given else None, e.layers) for k, e in found.items()]
    outlooks = outlooks_of(shipped(), mode, findings, tolerate)
    reader = None if met.skip else TrialReader(shipped(), findings, outlooks, tolerate)  # as for `ends`
    trials = trials_of(pair, plan, examples, run, skip=met.skip, reader=reader) if trial else []
    worth = None
    if calibration.given and together.count and not met.skip:
        worth = worth_of(together.features(), shipped().shares, [t.soft for t in trials])
    origin = None if base is None else origin_of(met, base, pair.a)
    notes = [n for n in (*met.agreed.notes, *plan.notes) if not n.startswith("no calibration data")]
    if not isinstance(pair.a.adapter, ModuleAdapter) and not classifying(pair.a):
        notes.append(
            "the outputs are not known to be class scores: if they are none, nats and points mean nothing. mergeid "
            "merge --data compares outputs of any kind"
        )
    if not calibration.given:
        notes.append("no --data: both models were run on random inputs, which is weaker evidence than real ones")
    if tally is not None and tally.examples and not (seen := tally.agreement()).told:
        notes.append(seen.held_against)
    if any(not o.nats.trusted and not o.nats.collapsed for o in outlooks):
        notes.append("parts of the evidence are far outside what the predictor was fitted on, so it cannot tell there")
    return PredictResult(
        plan.a,
        plan.b,
        plan.arch,
        mode,
        next(iter(found.values())).examples,
        tolerate,
        outlooks,
        _bound(pair, first, partners, origin, examples),
        shipped().version,
        notes,
        trials,
        worth,
        [] if origin is None else _interference(pair, origin),
        next(iter(found.values())).plain["behind"],
        None if met.skip else opinions,
    )


def _heard(pair: Pair, given: Examples | None, *sums: EndSums | TogetherSums | Opinions) -> tuple[Hears, Tally | None]:
    """What listens to both models, and what tells whether they know the inputs; None where there are no such inputs of
    both, or the outputs name no classes."""
    from mergeid.evaluate.agreement import Tally
    from mergeid.evaluate.nearness import EXAMPLES, classifying
    from mergeid.prediction.probe import comparable, hears

    listens = hears(*sums)
    asked = given is not None and given.owners is None and classifying(pair.a)
    tally = Tally(pair.a, (0.5, 0.5)) if asked else None

    def heard(a: Any, b: Any, batch: Batch) -> None:
        listens(a, b, batch)
        if tally is not None and comparable(a, b) and tally.examples < EXAMPLES:
            tally.add((a, b), batch, len(a))

    return heard, tally


def _interference(pair: Pair, origin: dict[str, Tensor]) -> list[Interference]:
    """Of what was trained: statistics of normalisation say where the data lies."""
    from mergeid.prediction.worth import interference_of

    trained = {k for k, _ in pair.a.model.named_parameters()}
    one, two = ({k: v for k, v in side.state().items() if k in trained} for side in (pair.a, pair.b))
    return interference_of(one, two, origin)


def check_tolerated(tolerate: float) -> None:
    """Raises `MergeidError` for what is no loss."""
    if not tolerate >= 0 or tolerate == float("inf"):
        raise MergeidError(f"--tolerate must be a loss in nats, 0 or more, got {tolerate:g}")


def _plain(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A network with these weights, ordinary where the model is asymmetric (what is merged are effective weights), and
    in float32 where they are shorter: the deviations of near models would drown in rounding."""
    import torch

    from mergeid.basics.state import load_weights
    from mergeid.nn.folding import fold_module, fold_state
    from mergeid.nn.names import asymmetric_parameters, gates

    net = copy.deepcopy(model)
    if asymmetric_parameters(state) and not gates(state):
        net, state = fold_module(net), fold_state(state)
    load_weights(net, state)
    short = any(p.dtype in (torch.bfloat16, torch.float16) for p in net.parameters())
    return net.float() if short else net


def _aligned(pair: Pair, element: Element, skip: Sequence[str]) -> nn.Module:
    """B in A's order; what the merge would take from A as it is comes from A."""
    skipped = skipped_keys(pair.a, skip)
    state = {k: v for k, v in pair.graph.apply_state(element, pair.b.state()).items() if k not in skipped}
    return _plain(pair.a.model if skipped else pair.b.model, {**state, **{k: pair.a.state()[k] for k in skipped}})


def _bound(
    pair: Pair,
    first: nn.Module,
    partners: dict[str, nn.Module],
    origin: dict[str, Tensor] | None,
    examples: Examples,
) -> Bound:
    """The paper's bound, of the pair as it lies: a shared fixed part is shared in that order only."""
    import torch

    from mergeid.data.batches import input_dtype, to_model
    from mergeid.nn.names import FIXED, asymmetric_parameters
    from mergeid.prediction.bound import chord_bound, no_bound
    from mergeid.prediction.probe import together

    state = pair.a.state()
    if origin is None:
        names = asymmetric_parameters(state)
        if not names or any(n + FIXED not in state for n in names):
            return no_bound()
        origin = {**state, **{n: torch.zeros_like(state[n]) for n in names}}
    fixed = _plain(pair.a.model, origin)
    device = next((p.device for p in first.parameters()), torch.device("cpu"))

    def batch_of(count: int) -> Batch:
        raw = examples.taken(range(count)).batches(count)[0]
        return pair.a.inputs_of(to_model(raw, device, input_dtype(first)))

    batch = batch_of(1 if examples.whole else min(BOUNDED, len(examples), together(first, pair.a.forward, batch_of(1))))
    return chord_bound(first, partners["direct"], fixed, pair.a.forward, batch)
