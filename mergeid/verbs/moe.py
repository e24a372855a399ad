"""``moe``: dense models into one mixture of experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.combine.apply import Inputs
from mergeid.errors import MergeidError
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MethodRequest
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching, Output, bytes_of
from mergeid.request.usual import Usual, requests_of
from mergeid.results.merge import MergeResult
from mergeid.stages.mixture import GATES, RANDOM, Prompts, mixed, mixture_of, prompted_gates, random_gates
from mergeid.stages.open import check_matching, open_models, output_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergeid.models.loaded import Loaded


@dataclass(frozen=True)
class Expert:
    """One model of a mixture.

    Attributes:
        source: file, folder or hub id.
        positive, negative: prompts that it is for, and that it is not for.
        residual_scale: factor of what it adds to the residual stream.
    """

    source: str | os.PathLike[str]
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    residual_scale: float = 1.0


@verb
def moe(
    base: str | os.PathLike[str],
    experts: Sequence[Expert | str | os.PathLike[str]],
    *,
    gate_mode: Annotated[
        str,
        o.Option(
            "hidden (the base's hidden states of each expert's prompts, at the last token), hidden_avg, cheap_embed "
            "(its embeddings), random, uniform_random.",
            choices=GATES,
        ),
    ] = "hidden",
    experts_per_token: Annotated[int, o.count("Experts per token.", o.HOW, 1, 1024)] = 2,
    output: Annotated[str | os.PathLike[str] | None, o.out("A folder. Default: ./moe.")] = None,
    match: o.Match = "auto",
    force: o.Force = False,
    shard_size: o.ShardSize = None,
    **usual: Unpack[Usual],
) -> MergeResult:
    """Build a mixture of experts from dense models, each aligned with the base first.

    Args:
        base: gives attention, embeddings, norms and head; experts: each gives the MLPs of its layers.
        gate_mode: how the routers are initialised; all but the random ones need prompts for every expert and the base's
            tokenizer.
        experts_per_token: how many experts process a token.
        output: a folder; default ``./moe``.
        shard_size: as for `merge`.
        match: "auto": experts whose neurons are in another order than the base's are aligned by their weights;
            "never": all are taken as they are.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`.

    Raises:
        WillNotMerge: an expert does not fit the base's order, and `force` is not given.
        MergeidError: anything wrong with the input; nothing was written.
    """
    listed = [e if isinstance(e, Expert) else Expert(e) for e in experts]
    if gate_mode not in GATES:
        raise MergeidError(f"--gate-mode {gate_mode!r} is not one of {', '.join(GATES)}")
    if len(listed) < max(2, experts_per_token):
        raise MergeidError(
            f"a mixture in which a token takes {experts_per_token} needs at least {max(2, experts_per_token)} "
            f"experts, got {len(listed)}"
        )
    if gate_mode not in RANDOM:
        without = next((e for e in listed if not e.positive), None)
        if without is not None:
            raise MergeidError(
                f"expert {without.source} has no positive_prompts, which --gate-mode {gate_mode} routes by; add some, "
                "or choose random"
            )
        if len({(e.positive, e.negative) for e in listed}) == 1:
            raise MergeidError("all experts have the same prompts, so they cannot be told apart; give each its own")
    run, reading = requests_of(usual, 32)
    matching, asked = Matching(match), Output(output, force=force, shard_size=bytes_of(shard_size))
    check_matching(matching, False)
    target = output_path(replace(asked, path=output or "moe"), [base, *(e.source for e in listed)])
    bench = Workbench(reading, run)
    met = open_models(bench, [base, *(e.source for e in listed)])
    origin = met.agreed.models[0]
    adapter, made = mixture_of(origin, len(listed), experts_per_token)
    plans = []
    inputs = Inputs(tuple(met.agreed.models))
    if match != "never":
        from mergeid.stages.match import planned_members
        from mergeid.stages.write import inputs_of

        settings = MethodRequest(get_method("linear")).over(len(met.models), met.float_names)
        members = planned_members(met, settings, matching, Calibration(None), asked)
        inputs, plans = inputs_of(met, members, {}), members.plans

    def running() -> tuple[Any, Loaded]:
        return adapter, bench.load(met.models[0])

    if gate_mode in RANDOM:
        gates = random_gates(made, gate_mode, len(listed), run.generator())
    else:
        prompts = [Prompts(e.positive, e.negative) for e in listed]
        gates = prompted_gates(made, gate_mode, prompts, origin, running)
    from mergeid.stages.write import rewrite

    whole = mixed(made, inputs, gates, [e.residual_scale for e in listed])
    record = {
        "method": "moe",
        "gate_mode": gate_mode,
        "base": str(base),
        "experts": [{**e.__dict__, "source": str(e.source)} for e in listed],
        "plans": [p.to_json() for p in plans],
        "seed": run.seed,
    }
    files = rewrite(whole, replace(asked, path=target), lambda name, tensor: tensor, record, run)
    verdict = "match" if any(p.verdict == "match" for p in plans) else "direct"
    return MergeResult(verdict, files=files, plans=plans, notes=list(met.agreed.notes))
