"""``plan``: what merging a pair would do, and why; nothing is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mergeid.errors import MergeidError
from mergeid.io.opening import Source
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Matching
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.stages.open import check_matching, open_models

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergeid.results.plan import Plan


@verb
def plan(
    a: Source,
    b: Source,
    *,
    data: o.Data = None,
    match: o.Match = "auto",
    matcher: o.Matcher = None,
    base: o.Base = None,
    certify: o.Certify = False,
    heads: o.Heads = None,
    solve: Annotated[
        bool, o.switch("Also say what solving the planned merge would change, layer by layer. Needs --data.")
    ] = False,
    batch_size: o.BatchSize = 32,
    **usual: Unpack[Usual],
) -> Plan:
    """Decide per space of neurons: merge directly, match first, or will not merge. Nothing is written.

    Args:
        a, b: files, folders, hub ids, or live modules.
        data: calibration data (labels unused), see `mergeid.data.load_data`; without it only the weights are compared.
        match: "auto" as decided per space, "always", "never".
        matcher: how neurons are matched (`mergeid.matchers.matcher_names`); default: combined with data, else weight.
        base: what both models were fine-tuned from. With data, and with a base or the fixed parts that asymmetric
            layers store, every space's record gets the structural margins of both models (`structure`).
        certify: also compute how far the inputs of every layer may shift before its order of neurons could change.
        heads: "both": for classifiers with different classes, as for `merge`.
        solve: also solve the planned merge in memory; `solved` then has every layer's error on unseen inputs, before
            and after.
        batch_size: examples in a forward pass.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`.

    Raises `MergeidError` for anything wrong with the input.
    """
    run, reading = requests_of(usual, batch_size, heads=heads)
    matching, calibration = Matching(match, matcher), calibration_of(data, usual)
    check_matching(matching, calibration.given)
    met = open_models(Workbench(reading, run), [a, b])
    from mergeid.stages.plan import plan_pair  # needs torch, which a pair that does not fit never loads

    pair, found = plan_pair(met, matching, calibration, base=base, certify=certify)
    if not solve:
        return found
    from mergeid.stages.members import averaged_pair
    from mergeid.stages.repair import SOLVE, repair_merged

    examples = met.bench.examples(calibration, pair.a)
    if examples is None:
        raise MergeidError("layers are solved on calibration inputs; give some with --data")
    members = averaged_pair(pair.a, pair.b, found, examples)
    done = repair_merged(members, mode=SOLVE, skip=met.skip, device=run.place, progress=run.tell)
    return replace(found, solved=done.by_layer)
