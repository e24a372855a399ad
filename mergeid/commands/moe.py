"""``mergeid moe``: dense models into one mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.verbs.moe import moe

if TYPE_CHECKING:
    from mergeid.results.merge import MergeResult


@command_of(moe)
def command(
    call: Call[MergeResult],
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe of mergekit-moe: base_model, experts (source_model, positive_prompts), gate_mode …",
            show_default=False,
        ),
    ],
    as_json: o.Json = False,
) -> int:
    """Build a mixture of experts from dense decoders, each aligned with the base first.

    Attention, embeddings and norms come from the base, and the MLPs from the experts. Routers are initialised from
    each expert's prompts. The result usually needs some training.
    """
    from mergeid.methods.mixture_recipe import ExpertEntry, read_mixture
    from mergeid.verbs.moe import Expert

    def expert(e: ExpertEntry) -> Expert:
        scale = 1.0 if e.residual_scale is None else e.residual_scale
        prompts = tuple(e.positive_prompts or ()), tuple(e.negative_prompts or ())
        return Expert(e.source_model, *prompts, scale, e.noise_scale or 0.0)

    told = read_mixture(recipe)
    names = ("gate_mode", "experts_per_token", "dtype", "architecture")
    said = {name: getattr(told, name) for name in names}
    with working(as_json) as work:
        own = {k: v for k, v in said.items() if v is not None and not call.given(k)}
        experts, shared = map(expert, told.experts), map(expert, told.shared_experts or ())
        result = call(told.base_model, [*experts], shared=[*shared], **own, progress=work.progress)
        if as_json:
            work.emit(result.to_json())
        else:
            work.close()
            for note in result.notes:
                work.say(f"Note: {note}")
            work.wrote(result.files)
    return 0
