"""Scales and signs of neurons that leave a function unchanged, read off its gradients.

If the weights W_i that lie on a space may be multiplied by c ** p_i, neuron by neuron, then the derivative of every
output along that change is zero: Σ p_i ⟨W_i, ∂f/∂W_i⟩ = 0 for every neuron. So the powers p are the null space of the
matrix of these products, of which backward passes give all spaces at once, whatever the operations are: units of ReLU,
LeakyReLU and gated layers, gains of norms against what reads them. A result counts only if random factors leave the
outputs unchanged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mergeid.basics.aliases import shared_alike
from mergeid.basics.casting import in_precision, kept_kind
from mergeid.basics.nested import dense_tensors, mapped
from mergeid.basics.state import evaluating, forget_derived, tensors_of, uncompiled
from mergeid.neuron_graph.compare import Yardstick, as_real
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.probe import at_least, randomised
from mergeid.neuron_graph.scaled import Column, Powers, Scaled, Stream
from mergeid.neuron_graph.space import Space
from mergeid.neuron_graph.turned import Turn
from mergeid.neuron_graph.verify import TOLERANCE

APART = 4
"""Positions of a neuron on one axis that may have powers of their own (fused projections); more are one."""
NOTHING = 1e-9
"""Singular values, in shares of the largest, that are zero."""
PASSES = 12
"""Backward passes at most."""


def find_powers(
    graph: NeuronGraph,
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
    *,
    generator: Generator,
    only: Sequence[str],
) -> Powers:
    """Scales and signs of the spaces `only`, each proven in float64 on disturbed weights; nothing where the model does
    not run in float64, or backwards.

    Args:
        model: not changed; a copy of it runs.
        forward: (model, inputs) -> all outputs that a caller reads, in any nest.
    """
    spaces = [graph.by_id[k] for k in only]
    if not spaces:
        return Powers()
    trial = Trial(model, inputs, forward, generator)
    try:
        columns = {s.id: columns_of(s, trial.state) for s in spaces}
        found = trial.products(columns, spaces)
    except Exception:  # whatever a foreign forward says to gradients, or to float64
        return Powers()
    vectors = {s.id: _powers(columns[s.id], found[s.id]) for s in spaces}
    scaled = [Scaled(s.id, s.size, powers) for s in spaces for powers in vectors[s.id]]
    scaled = trial.holding(scaled, lambda one: one.scale(_factors(one.size, generator)))
    streams: list[Stream] = []
    for space in spaces:
        own = [one.powers for one in scaled if one.space == space.id]
        for stream in _streams(space, columns[space.id], own):
            signs = np.where(_factors(space.size, generator) < 1, -1.0, 1.0)
            if trial.holds([stream.sign(signs)]):
                streams.append(stream)
                break
    return Powers(tuple(scaled), tuple(streams))


def columns_of(space: Space, state: Mapping[str, Tensor]) -> list[Column]:
    """Where a space lies, vectors first; a tensor of several names once."""
    found: dict[Any, Column] = {}
    for axis in sorted(space.axes, key=lambda a: state[a.tensor].dim()):
        value = state[axis.tensor]
        parts = axis.positions.T[:, :, None] if axis.positions.shape[1] <= APART else axis.positions[None]
        for k, part in enumerate(parts):
            key = (value.data_ptr(), tuple(value.shape), value.stride(), axis.axis, k)
            seen = found.get(key)
            names = (*(seen.tensors if seen else ()), axis.tensor)
            found[key] = Column(names, axis.axis, part, axis.members, tuple(value.shape))
    return list(found.values())


class Trial:
    """A copy of a model, in float64 and on disturbed weights, on which changes of its weights are tried."""

    def __init__(
        self, model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any], generator: Generator | None
    ) -> None:
        """Args:
        generator: of the disturbance; None: the weights as they are."""
        self.probe = shared_alike(in_precision(evaluating(copy.deepcopy(model)), torch.float64), model)
        self.state = tensors_of(self.probe)  # one storage for a tensor of several names
        disturbed = randomised(self.probe, generator) if generator is not None else {}
        self.inputs, self.forward, self.generator = inputs, forward, generator
        self._load(disturbed)
        self.origin = {k: v.clone() for k, v in tensors_of(self.probe).items()}
        self.yardstick: Yardstick | None = None

    def _load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self.state[name].copy_(value)
        forget_derived(self.probe)

    def run(self) -> dict[str, Tensor]:
        """All outputs by name in float64, on the weights that the copy has now."""
        wide = mapped(self.inputs, lambda t: t.detach().to(kept_kind(t, torch.float64), copy=True))
        with uncompiled(), at_least(torch.float64), torch.random.fork_rng([]):
            torch.manual_seed(0)
            return {name: as_real(t) for name, t in dense_tensors(self.forward(self.probe, wide)).items()}

    def stays(self, turns: Sequence[Turn]) -> bool:
        """Whether the outputs are the same under changes of the weights."""
        return self._both(turns)[0] <= TOLERANCE[torch.float64]

    def _both(self, turns: Sequence[Turn]) -> tuple[float, float]:
        """The error of changes, and of the same on one axis only."""
        yardstick, moved = self._measure(), self._changed(turns)
        if yardstick.error(moved) > TOLERANCE[torch.float64]:
            return yardstick.error(moved), inf
        alone = self._changed([replace(t, of=replace(t.of, axes=t.of.axes[-1:])) for t in turns])
        yardstick.learn(alone)
        return yardstick.error(moved), yardstick.error(alone)

    def _measure(self) -> Yardstick:
        if self.yardstick is None:
            with torch.no_grad():
                self.yardstick = Yardstick(self.run())
        return self.yardstick

    def _changed(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """The outputs under changes of the weights."""
        with torch.no_grad():
            moved = {k: v for k, v in self.origin.items() if any(a.tensor == k for t in turns for a in t.of.axes)}
            for turn in turns:
                moved = {k: turn.apply(k, v) for k, v in moved.items()}
            self._load(moved)
            answer = self.run()
            self._load({k: self.origin[k] for k in moved})
        return answer

    def holds(self, turns: Sequence[Turn]) -> bool:
        """Whether the outputs stay, and would not if the change were made on one axis only."""
        error, alone = self._both(turns)
        return error <= TOLERANCE[torch.float64] < alone

    def holding(self, found: list[Scaled], change: Callable[[Scaled], Turn]) -> list[Scaled]:
        """Those that hold: all at once, else by halves."""
        if not found or self.holds([change(one) for one in found]):
            return found
        if len(found) == 1:
            return []
        half = len(found) // 2
        return [*self.holding(found[:half], change), *self.holding(found[half:], change)]

    def products(self, columns: Mapping[str, list[Column]], spaces: Sequence[Space]) -> dict[str, np.ndarray]:
        """Space -> ⟨W, ∂f/∂W⟩ [backward passes, neurons, columns] for random sums f of the outputs."""
        assert self.generator is not None
        weights = {k: p for k, p in self.probe.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        used = {c.tensors[0]: weights[c.tensors[0]] for s in spaces for c in columns[s.id] if c.tensors[0] in weights}
        for weight in used.values():
            weight.requires_grad_(True)
        passes = max(2, *(-(-3 * len(columns[s.id]) // (2 * s.size)) for s in spaces))
        rows: dict[str, list[np.ndarray]] = {s.id: [] for s in spaces}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            out = [t for t in self.run().values() if t.requires_grad]
            for _ in range(min(passes, PASSES)):
                draw = [torch.randn(t.shape, generator=self.generator, dtype=t.dtype).to(t.device) for t in out]
                total = torch.stack([(t * d).nan_to_num(0, 0, 0).sum() for t, d in zip(out, draw, strict=True)]).sum()
                slopes = torch.autograd.grad(total, list(used.values()), retain_graph=True, allow_unused=True)
                by_name = dict(zip(used, slopes, strict=True))
                for space in spaces:
                    rows[space.id].append(
                        np.stack([_products(space, c, self.state, by_name) for c in columns[space.id]], axis=1)
                    )
        return {k: np.stack(v) for k, v in rows.items()}


def _products(
    space: Space, column: Column, state: Mapping[str, Tensor], slopes: Mapping[str, Tensor | None]
) -> np.ndarray:
    out = np.zeros(space.size)
    slope = slopes.get(column.tensors[0])
    if slope is not None:
        value = (state[column.tensors[0]].detach() * slope).movedim(column.axis, 0).flatten(1 if slope.dim() > 1 else 0)
        along = (value.sum(1) if value.dim() > 1 else value).cpu().numpy()
        out[column.members] = along[column.positions].sum(1)
    return out


def _powers(columns: Sequence[Column], products: np.ndarray) -> list[tuple[tuple[Column, int], ...]]:
    """The null space of the products in whole numbers, vectors with powers of both signs."""
    matrix = products.reshape(-1, products.shape[-1])
    sizes = np.abs(matrix).max(0)
    alive = np.flatnonzero(sizes > 1e-12 * sizes.max(initial=0))
    if len(alive) < 2 or not np.isfinite(sizes).all():
        return []
    matrix = matrix[:, alive]
    lengths = np.linalg.norm(matrix, axis=1)
    matrix = matrix[lengths > 1e-12 * lengths.max()]
    matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    if len(matrix) < len(alive):
        return []
    _, values, axes = np.linalg.svd(matrix, full_matrices=False)
    basis = _reduced(axes[values < NOTHING * values[0]].copy())
    whole = np.round(basis)
    return [
        tuple((columns[alive[k]], int(row[k])) for k in np.flatnonzero(row))
        for row, exact in zip(whole, basis, strict=True)
        if np.abs(row - exact).max() < 1e-5 and np.abs(row).max() <= 2 and row.min() < 0 < row.max()
    ]


def _reduced(basis: np.ndarray) -> np.ndarray:
    """Reduced row echelon form."""
    row = 0
    for column in range(basis.shape[1]):
        if row == len(basis):
            break
        pivot = row + int(np.abs(basis[row:, column]).argmax())
        if abs(basis[pivot, column]) < 1e-6:
            basis[row:, column] = 0
            continue
        basis[[row, pivot]] = basis[[pivot, row]]
        basis[row] /= basis[row, column]
        for other in range(len(basis)):
            if other != row:
                basis[other] -= basis[other, column] * basis[row]
        row += 1
    return basis


def _streams(
    space: Space, columns: Sequence[Column], scaled: Sequence[tuple[tuple[Column, int], ...]]
) -> Iterator[Stream]:
    """What might change sign with the neurons: matrices, and of the vectors those that are no gains, or none."""
    gains = []
    for powers in scaled:
        up = [c for c, p in powers if p > 0]
        down = [c for c, p in powers if p < 0]
        if len(up) == 1 and up[0].vector and not any(c.vector for c in down):
            gains.append((up[0], tuple(down)))
    taken = {id(gain) for gain, _ in gains}
    vectors = [c for c in columns if c.vector and id(c) not in taken]
    matrices = [c for c in columns if not c.vector]
    if len(matrices) < 2:
        return
    for flipped in (vectors, []) if vectors else ([],):
        fixed = () if flipped else tuple(vectors)
        yield Stream(space.id, space.size, (*matrices, *flipped), tuple(gains), fixed)


def _factors(size: int, generator: Generator) -> np.ndarray:
    """Between a half and two."""
    found: np.ndarray = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1).exp2().numpy()
    return found
