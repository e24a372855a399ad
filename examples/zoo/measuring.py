"""A pair measured: losses on the line from A to B, as they are and matched, and what mergeid decides about it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tasks import Examples
from torch import Tensor, nn
from training import logits, scores

from mergeid.basics.state import load_weights
from mergeid.evaluate.interpolate import load_between
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings
from mergeid.models.examples import Examples as Given
from mergeid.models.graph import graph_of
from mergeid.models.loaded import Loaded
from mergeid.models.running import make_accelerator
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.nn import fold_module, fold_state, is_asymmetric
from mergeid.plugins import Architecture, Batch, LossParts
from mergeid.repair.batchnorm import reestimate_batchnorm
from mergeid.repair.rescale import output_moments, rescalable_layers, rescale
from mergeid.request.request import Matching, Run
from mergeid.results.plan import Plan
from mergeid.stages.compare import Comparison, label, last_look, merges_of
from mergeid.stages.members import Member, Members
from mergeid.stages.open import Pair
from mergeid.stages.plan import Structural, make_plan
from mergeid.stages.repair import LEANING, SOLVE, repair_merged, repairs

LAMBDAS = tuple(k / 10 for k in range(11))
WEAK = 64
"""Calibration inputs of the second plan."""


class ZooAdapter:
    """Runs any network of the zoo on ``{"arg0": input, "labels": labels}``."""

    name = "torch"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return logits(model(batch["arg0"]))

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts:
        count = torch.full((len(output),), batch["labels"][0].numel())
        losses, right = scores(output, batch["labels"])
        return LossParts(losses * count, (right * count).round().long(), count)

    def space_label(self, arch: Architecture, axes: object) -> None:
        return None


ADAPTER = ZooAdapter()


def loaded(net: nn.Module, name: str, example: Batch) -> Loaded:
    """A live network as mergeid's parts take it."""
    names = {k: k for k in net.state_dict()}
    return Loaded(name, net.eval(), ADAPTER, Architecture("torch", name), None, names, example)  # type: ignore[arg-type]


def graph(net: nn.Module, name: str, example: Batch) -> NeuronGraph:
    """Its verified neuron graph, which holds for every network of the same shape."""
    return graph_of(loaded(net, name, example))


@dataclass(frozen=True)
class Curve:
    """Loss in nats [λ, examples] and share of right predictions at `LAMBDAS`."""

    losses: np.ndarray
    right: np.ndarray

    @property
    def barrier(self) -> float:
        """Largest excess of the mean loss over the chord, nats, at least 0."""
        return excess(self.losses.mean(1))

    @property
    def points(self) -> float:
        """Largest shortfall of the accuracy below the chord, percentage points, at least 0."""
        return 100 * excess(-self.right.mean(1))


def excess(values: np.ndarray) -> float:
    """Largest excess over the straight line between the ends, at least 0."""
    chord = np.linspace(values[0], values[-1], len(values))
    return float(max(0.0, (values - chord).max()))


@dataclass(frozen=True)
class Decision:
    """What mergeid does with a pair of its own accord.

    Attributes:
        plan: its plan.
        element: what it applies to B after its last look at both merges.
        overruled: whether that last look chose another merge than the planned one.
    """

    plan: Plan
    element: Element
    overruled: bool


class PairOfNets:
    """Two networks of one neuron graph with test and calibration data.

    Args:
        repair: of the family, "bn", "repair" or "".
        matcher: name in mergeid's registry; None: its own choice.
    """

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        graph: NeuronGraph,
        repair: str,
        test: Examples,
        calibration: Examples,
        matcher: str | None = None,
    ) -> None:
        self.matcher = matcher
        self.graph, self.repair, self.test, self.calibration = graph, repair, test.batch(), calibration
        example = {k: v[:2] for k, v in self.test.items()}
        self.a, self.b = loaded(a, "a", example), loaded(b, "b", example)
        self.accelerator = make_accelerator("cpu")
        self.folds = is_asymmetric(a.state_dict())
        self.work = copy.deepcopy(a)
        if self.folds:
            fold_module(self.work)

    def state_b(self, element: Element) -> dict[str, Tensor]:
        """B under an element, as an ordinary network."""
        return self._plain(self.graph.apply_state(element, self.b.state()))

    @cached_property
    def state_a(self) -> dict[str, Tensor]:
        return self._plain(self.a.state())

    def _plain(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fold_state(state) if self.folds else dict(state)

    # -- the line -------------------------------------------------------------------------------------------

    def curve(self, element: Element, repaired: bool, ends: Curve | None = None) -> Curve:
        """The line to B under an element. `ends`: another curve of this pair, whose ends are the same functions."""
        b = self.state_b(element)
        fix = self.repairer(b, self.calibration) if repaired else None
        found = []
        for k, x in enumerate(LAMBDAS):
            if ends is not None and x in (0.0, 1.0):
                found.append((ends.losses[k], ends.right[k]))
            else:
                found.append(self.at(b, x, fix))
        return Curve(np.stack([f[0] for f in found]), np.stack([f[1] for f in found]))

    def at(
        self, b: Mapping[str, Tensor], x: float, fix: Callable[[float], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Loss and right predictions per test example at one point, after the repair `fix`."""
        load_between(self.work, self.state_a, b, x)
        if fix is not None:
            fix(x)
        with torch.no_grad():
            losses, right = scores(ADAPTER.forward(self.work, self.test), self.test["labels"])
        return losses.numpy(), right.numpy()

    def repairer(self, b: Mapping[str, Tensor], calibration: Examples) -> Callable[[float], None] | None:
        """Repairs the network that lies in the workspace at λ; None where the family has nothing to repair."""
        batch = calibration.batch()
        forward = ADAPTER.forward
        if self.repair == "bn":

            def estimate(x: float) -> None:
                reestimate_batchnorm(self.work, [batch], forward=forward, accelerator=self.accelerator)

            return estimate
        if not self.repair:
            return None
        layers = rescalable_layers(self.work, batch, forward=forward)
        ends = []
        for x in (0.0, 1.0):
            load_between(self.work, self.state_a, b, x)
            ends.append(output_moments(self.work, layers, [batch], forward=forward))

        def fix(x: float) -> None:
            if x not in (0.0, 1.0):
                targets = {
                    k: tuple((1 - x) * getattr(ends[0][k], n) + x * getattr(ends[1][k], n) for n in ("mean", "std"))
                    for k in ends[0]
                }
                rescale(self.work, layers, targets, [batch], forward=forward)  # type: ignore[arg-type]

        return fix

    def losses(self, element: Element, calibration: Examples | None) -> np.ndarray:
        """Test losses, float64 [examples], of the merge that mergeid would write under this element: BatchNorm
        statistics estimated again where there is data, and nothing else repaired."""
        b = self.state_b(element)
        fix = self.repairer(b, calibration) if calibration is not None and self.repair == "bn" else None
        return self.at(b, 0.5, fix)[0]

    def middle(self, element: Element, calibration: Examples | None) -> float:
        """The mean of `losses`."""
        return float(self.losses(element, calibration).mean())

    # -- the decisions --------------------------------------------------------------------------------------

    def always(self, calibration: Examples | None) -> Element:
        """mergeid's match of every space."""
        return self._plan(calibration, "always").element

    def decide(self, calibration: Examples | None) -> Decision:
        """What `mergeid merge` would do, the last look included."""
        plan = self.planned(calibration)
        if calibration is None:
            return Decision(plan, plan.element, False)
        written, found = last_look(self._members(plan, calibration), "auto", run=Run(batch_size=len(calibration)))
        chosen = written.models[1].plan
        assert chosen is not None
        return Decision(plan, chosen.element, found.chosen != found.planned)

    def looked(self, calibration: Examples) -> tuple[Comparison, dict[str, np.ndarray]]:
        """What mergeid's last look says, and the test losses, float64 [examples], of every merge that it looked at,
        repaired on all of the calibration inputs."""
        members = self._members(self.planned(calibration), calibration)
        _, found = last_look(members, "auto", run=Run(batch_size=len(calibration)))
        losses = {}
        for name, merge in merges_of(members)[1].items():
            solved = [kind for kind in (SOLVE, LEANING) if label(name, kind) in found.distances]
            for kind in [*repairs(members, "auto"), *solved]:
                net = copy.deepcopy(self.a.model)
                repaired = repair_merged(merge, mode=kind).tensors
                load_weights(net, {**merge.merged_state(), **repaired})
                losses[label(name, kind)] = self.losses_of(net)
        return found, losses

    def losses_of(self, net: nn.Module) -> np.ndarray:
        """Test losses of a network, float64 [examples]."""
        with torch.no_grad():
            return scores(ADAPTER.forward(net.eval(), self.test), self.test["labels"])[0].numpy()

    def _members(self, plan: Plan, calibration: Examples) -> Members:
        names = [k for k, v in self.a.state().items() if v.is_floating_point()]
        settings = MergeSettings.of(get_method("linear"), 2, names)
        return Members([Member(self.a), Member(self.b, plan)], None, settings, Given(calibration))

    def planned(self, calibration: Examples | None) -> Plan:
        """mergeid's plan, before the last look."""
        return self._plan(calibration, "auto")

    def _plan(self, calibration: Examples | None, match: str) -> Plan:
        return make_plan(
            Pair(self.a, self.b, self.graph),
            Matching(match, self.matcher),
            Run(batch_size=256),
            examples=None if calibration is None else Given(calibration),
            structural=Structural(beside=False),
        )
