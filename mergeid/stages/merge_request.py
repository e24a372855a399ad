"""All that a merge is asked for, and what of it does not go together."""

from __future__ import annotations

from dataclasses import dataclass

from mergeid.errors import MergeidError
from mergeid.io.opening import Source, is_live
from mergeid.methods.registry import check_base
from mergeid.methods.settings import MethodRequest
from mergeid.request.request import Calibration, Matching, Output, OwnData, Repairing, check_transport
from mergeid.stages.open import check_matching


@dataclass(frozen=True)
class MergeRequest:
    """All that a merge is asked for.

    Attributes:
        models: two or more, or one for methods that take one; the others are brought into the first one's order.
        base: what they were fine-tuned from, for methods that need it.
        transport: whether neurons are carried by optimal transport instead of being matched.
        heads: "both": one head with the classes of all.

    Raises `MergeidError` for what does not go together.
    """

    models: tuple[Source, ...]
    base: Source | None
    asked: MethodRequest
    calibration: Calibration
    matching: Matching
    repairing: Repairing
    output: Output
    transport: bool
    heads: str | None = None

    def __post_init__(self) -> None:
        method, stage, data = self.asked.method, self.repairing.stage, self.calibration.given
        average = method.weights == "shares" and method.most is None and method.statistics is None
        # a recipe of one model gives it another dtype, other tokens, or lays an adapter on it
        least = method.least if method.most == 1 or self.base is not None or average else 2
        if len(self.models) < least:
            raise MergeidError(
                f"merging takes at least {'two models' if least == 2 else 'one model'}, got {len(self.models)}"
            )
        check_base(method, self.base is not None)
        if self.output.resume and any(map(is_live, self.models)):
            raise MergeidError("only merges of files can be resumed, not those of live modules; leave resume out")
        self._check_target()
        if self.heads is not None:
            self._check_heads()
        if not data and stage not in ("auto", "none"):
            raise MergeidError(f"--repair {stage} measures activations; give examples with --data")
        if not data and method.statistics:
            what = "Gram matrices of the layers' inputs" if method.statistics == "gram" else "the Fisher information"
            raise MergeidError(f"method {method.name!r} measures {what}; give examples with --data")
        if self.matching.plan is not None and (len(self.models) != 2 or self.base is not None):
            raise MergeidError(
                f"--plan is for two models, got {len(self.models)}{' and a base' if self.base is not None else ''}; "
                "leave it out, and all are matched anew"
            )
        if self.transport:
            check_transport(self.matching, base=self.base is not None)
            if self.output.resume:
                raise MergeidError(
                    "--resume cannot be combined with --transport; leave it out and merge from the start"
                )
        else:
            check_matching(self.matching, data)

    def _check_heads(self) -> None:
        if self.asked.method.statistics == "fisher":
            raise MergeidError(
                f"method {self.asked.method.name!r} weighs tensors by predictions over all classes, and with --heads "
                "both no model knows all of them; choose another method"
            )
        if self.repairing.stage == "solve+polish":
            raise MergeidError(
                "--repair solve+polish imitates predictions over all classes, and with --heads both no model knows all "
                "of them; give --repair solve"
            )

    def _check_target(self) -> None:
        own, target = self.calibration.data, self.repairing.target
        if not isinstance(own, OwnData):
            if target == "own":
                raise MergeidError("--target own needs separate data for each model; give --data a=…,b=…")
            return
        if len(own.data) != len(self.models):
            raise MergeidError(
                f"--data names {len(own.data)} models, and {len(self.models)} are merged; give data for each"
            )
        if target == "mean":
            return
        if self.asked.method.weights != "shares" or self.base is not None or self.repairing.stage == "solve+polish":
            raise MergeidError(
                "--target own solves plain averages only, without task vectors or polish; for these give --target mean"
            )
