"""``moe``: dense models into one mixture of experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from mergeid.combine.apply import Inputs
from mergeid.errors import MergeidError
from mergeid.io.dtypes import parse_dtype
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MethodRequest
from mergeid.models.workbench import Workbench
from mergeid.plugins import MixtureRequest
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching, Output, bytes_of
from mergeid.request.usual import Usual, requests_of
from mergeid.results.merge import MergeResult
from mergeid.stages.mixture import (
    GATES,
    RANDOM,
    Expert,
    mixed,
    mixture_of,
    prompted_gates,
    random_gates,
    routers,
)
from mergeid.stages.open import check_matching, open_models, output_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergeid.models.loaded import Loaded


__all__ = ["Expert", "moe"]


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
    shared: Sequence[Expert | str | os.PathLike[str]] = (),
    architecture: Annotated[
        str | None,
        o.Option(
            "What the result is: mixtral, deepseek, qwen (Qwen2-MoE, or Qwen3-MoE). Default: the first of them that "
            "the models can make.",
            metavar="NAME",
            shown=False,
        ),
    ] = None,
    output: Annotated[str | os.PathLike[str] | None, o.out("A folder. Default: ./moe.")] = None,
    dtype: o.Dtype = None,
    shard_size: o.ShardSize = None,
    match: o.Match = "auto",
    force: o.Force = False,
    **usual: Unpack[Usual],
) -> MergeResult:
    """Build a mixture of experts from dense models, each aligned with the base first.

    Args:
        base: gives attention, embeddings, norms and head; experts: each gives the MLPs of its layers.
        gate_mode: how the routers are initialised; all but the random ones need prompts for every expert and the base's
            tokenizer.
        experts_per_token: how many experts process a token.
        shared: models whose MLPs process every token, for mixtures that have them.
        architecture: what the name of the result begins with; None: the first that can be made.
        output: a folder; default ``./moe``.
        dtype: of the result; None: as in the base.
        shard_size: most bytes of one weight file (5_000_000_000, "5GB"); None: files as the base's.
        match: "auto": experts whose neurons are in another order than the base's are aligned by their weights;
            "never": all are taken as they are.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`.

    Raises:
        WillNotMerge: an expert does not fit the base's order, and `force` is not given.
        MergeidError: anything wrong with the input; nothing was written.
    """
    routed, always = _experts(experts), _experts(shared)
    everyone = [*routed, *always]
    gated = None if gate_mode in RANDOM else bool(always) and all(e.positive for e in always)
    _check(routed, always, gate_mode, experts_per_token)
    run, reading = requests_of(usual, 32, "a")  # whatever tokens the experts have
    matching, asked = Matching(match), Output(output, dtype, force, bytes_of(shard_size))
    check_matching(matching, False)
    target = output_path(replace(asked, path=output or "moe"), [base, *(e.source for e in everyone)])
    bench = Workbench(reading, run)
    met = open_models(bench, [base, *(e.source for e in everyone)])
    origin = met.agreed.models[0]
    wanted = MixtureRequest(len(routed), experts_per_token, len(always), gated, architecture)
    adapter, made = mixture_of(origin, wanted)
    plans = []
    inputs = Inputs(tuple(met.agreed.models))
    settings = MethodRequest(get_method("linear"), seed=run.seed).over(len(met.models), met.float_names)
    if match != "never":
        from mergeid.stages.match import planned_members
        from mergeid.stages.write import inputs_of

        members = planned_members(met, settings, matching, Calibration(None), asked)
        inputs, plans = inputs_of(met, members, {}), members.plans

    def running() -> tuple[Any, Loaded]:
        return adapter, bench.load(met.models[0])

    if gate_mode in RANDOM:
        rows = random_gates(made, gate_mode, len(everyone), run.generator())
    else:
        rows = prompted_gates(made, gate_mode, everyone if made.shared_gates else routed, origin, running)
    from mergeid.stages.write import rewrite

    gates = routers(made, rows, len(routed))
    whole = mixed(made, inputs, gates, everyone, settings.generator, None if dtype is None else parse_dtype(dtype))
    record = {
        "method": "moe",
        "gate_mode": gate_mode,
        "base": str(base),
        "experts": [{**e.__dict__, "source": str(e.source)} for e in routed],
        "shared_experts": [{**e.__dict__, "source": str(e.source)} for e in always],
        "plans": [p.to_json() for p in plans],
        "seed": run.seed,
    }
    files = rewrite(whole, replace(asked, path=target), lambda name, tensor: (tensor,), record, run)
    verdict = "match" if any(p.verdict == "match" for p in plans) else "direct"
    return MergeResult(verdict, files=files, plans=plans, notes=[*met.agreed.notes, *made.notes])


def _experts(listed: Sequence[Expert | str | os.PathLike[str]]) -> list[Expert]:
    return [e if isinstance(e, Expert) else Expert(e) for e in listed]


def _check(routed: Sequence[Expert], shared: Sequence[Expert], gate_mode: str, per_token: int) -> None:
    """Raise `MergeidError` for experts that cannot be routed to."""
    if gate_mode not in GATES:
        raise MergeidError(f"--gate-mode {gate_mode!r} is not one of {', '.join(GATES)}")
    if len(routed) < per_token:
        raise MergeidError(
            f"a mixture in which a token takes {per_token} needs at least {per_token} experts, got {len(routed)}"
        )
    if gate_mode in RANDOM:
        return
    without = next((e for e in routed if not e.positive), None)
    if without is not None:
        raise MergeidError(
            f"expert {without.source} has no positive_prompts, which --gate-mode {gate_mode} routes by; add some, "
            "or choose random"
        )
    if len({bool(e.positive) for e in shared}) > 1:
        raise MergeidError("only some of the shared experts have positive_prompts; expected all of them or none")
    if len(routed) > 1 and len({(e.positive, e.negative) for e in routed}) == 1:
        raise MergeidError("all experts have the same prompts, so they cannot be told apart; give each its own")
