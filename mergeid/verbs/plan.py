"""``plan``: what merging a pair would do, and why; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeid.models.source import Source
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import LIMIT, Calibration, Example, Matching, Progress, Reading, Run
from mergeid.stages.open import check_matching, open_models

if TYPE_CHECKING:
    from mergeid.results.plan import Plan


@verb
def plan(
    a: Source,
    b: Source,
    *,
    data: o.Data = None,
    arch: o.Arch = None,
    config: o.Config = None,
    match: o.Match = "auto",
    matcher: o.Matcher = None,
    seed: o.Seed = 0,
    limit: o.Limit = LIMIT,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
    skip: o.Skip = (),
    allow_pickle: o.AllowPickle = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    base: o.Base = None,
    certify: o.Certify = False,
    progress: Progress | None = None,
) -> Plan:
    """Decide per space of neurons: merge directly, match first, or will not merge. Nothing is written.

    Args:
        a, b: files, folders, hub ids, or live modules.
        data: calibration data (labels unused), see `mergeid.data.load_data`; without it only the weights are compared.
        config: "a" or "b": whose config counts where they differ in what the network computes; None: that is refused.
        match: "auto" as decided per space, "always", "never".
        matcher: how neurons are matched (`mergeid.matchers.matcher_names`); default: combined with data, else weight.
        limit: most calibration examples.
        skip: globs of tensor names that the merge takes from A as they are.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        base: what both models were fine-tuned from. With data, and with a base or the fixed parts that asymmetric
            layers store, every space's record gets the structural margins of both models (`structure`).
        certify: compute the layers' radii of stability too.

    Raises `MergeidError` for anything wrong with the input.
    """
    run = Run.of(progress, device=device, seed=seed, batch_size=batch_size)
    matching, calibration = Matching(match, matcher), Calibration(data, limit)
    check_matching(matching, calibration.given)
    reading = Reading(arch, config, tuple(skip), allow_pickle, Example.of(example_inputs, outputs))
    met = open_models(Workbench(reading, run), [a, b])
    from mergeid.stages.plan import plan_pair  # needs torch, which a pair that does not fit never loads

    return plan_pair(met, matching, calibration, base=base, certify=certify)[1]
