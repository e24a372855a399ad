"""A few hundred steps of distillation after the closed form: the merged network against the models' predictions.

No labels: of a classifying head the Kullback-Leibler divergence from the mixture of the models' predictions, of any
other output the squared distance from their mean, over its variance; one that is the same for all examples, or of none
of them (a penalty, say), is left out. Examples that take no part in the steps judge: the
weights that were nearest on them are kept, and if none were nearer than the first, these. The same steps can be taken
again on all examples (`polished_again`), when it is known how many are good.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import inf, isfinite
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mergeid.basics.spread import Spread
from mergeid.basics.state import tensors_of
from mergeid.data.batches import first_line
from mergeid.errors import MergeidError
from mergeid.plugins import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Outputs = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    rates: of AdamW, one round each, from where the round before it was best; each falls to 0 as a cosine.
    steps: in a round. every: steps between two looks at the examples that judge. decay: weight decay.
    seed: of the order of the examples.
    """

    rates: tuple[float, ...] = (2e-3, 4e-4)
    steps: int = 300
    every: int = 20
    decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Polished:
    """Attributes:
    before, after: distance on the examples that judge. steps: of every round, after which the weights were kept.
    """

    before: float
    after: float
    steps: tuple[int, ...]


class Aim:
    """What the models say together.

    Args:
        models: in eval mode; shares: their weights, with sum 1.
        outputs: (network, batch) -> its outputs by name.
        heads: names of the outputs whose last dimension holds logits.

    Of other outputs their variance over all examples is wanted first (`measure`).
    """

    def __init__(
        self, models: Sequence[nn.Module], shares: Sequence[float], outputs: Outputs, heads: frozenset[str]
    ) -> None:
        self.models, self.shares, self.heads = models, shares, heads
        self._outputs = outputs
        self._spreads: dict[str, float] | None = None

    def outputs(self, net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """float32, complex numbers as two, without what is of no example."""
        found = {n: torch.view_as_real(t) if t.is_complex() else t for n, t in self._outputs(net, batch).items()}
        return {n: t.float() for n, t in found.items() if t.dim() > 0}

    def measure(self, batches: Iterable[Batch]) -> None:
        """Take the variance of what the models say about its mean over all examples. Once: later calls do nothing."""
        if self._spreads is not None:
            return
        seen: dict[str, Spread] = {}
        for batch in batches:
            said = self.said(batch)
            if said.keys() <= self.heads:
                break
            for name in said.keys() - self.heads:
                seen.setdefault(name, Spread()).add(said[name], batch)
        self._spreads = {n: s.variance(torch.float32) for n, s in seen.items() if not s.constant(torch.float32)}

    @torch.no_grad()
    def said(self, batch: Batch) -> dict[str, Tensor]:
        """Probabilities of classifying heads, values of other outputs."""
        total: dict[str, Tensor] = {}
        for share, model in zip(self.shares, self.models, strict=True):
            for name, out in self.outputs(model, batch).items():
                value = share * (out.softmax(-1) if name in self.heads else out)
                total[name] = total[name] + value if name in total else value
        return total

    def counts(self, said: Mapping[str, Tensor]) -> bool:
        """Whether any of these outputs is aimed at."""
        return any(name in self.heads or self._spread(name) is not None for name in said)

    def loss(self, net: nn.Module, batch: Batch, said: Mapping[str, Tensor]) -> Tensor:
        """Mean over the examples (tokens, where a mask says which are real), summed over the outputs."""
        mask = batch.get("attention_mask")
        total = torch.zeros(())
        for name, out in self.outputs(net, batch).items():
            wanted, spread = said[name], None if name in self.heads else self._spread(name)
            if name not in self.heads and spread is None:
                continue
            if isinstance(mask, Tensor) and out.dim() > 1 and mask.shape == out.shape[:-1]:
                out, wanted = out[mask.bool()], wanted[mask.bool()]  # padding need not hold numbers
            if spread is None:
                # a class that nobody names counts nothing, be it ruled out (a logit of -inf) or not
                each = F.kl_div(out.log_softmax(-1).masked_fill(wanted == 0, 0.0), wanted, reduction="none").sum(-1)
            else:
                lacking = ~wanted.isfinite()  # a mask
                each = (out.masked_fill(lacking, 0.0) - wanted.masked_fill(lacking, 0.0)).square() / spread
                each = each.mean(-1) if each.dim() > 1 else each
            total = total.to(each.device) + each.sum() / max(each.numel(), 1)
        return total

    def _spread(self, name: str) -> float | None:
        """None: it says nothing."""
        if self._spreads is None:
            raise ValueError("the spread of the outputs is not measured yet")
        return self._spreads.get(name)


def polish_network(
    merged: nn.Module,
    aim: Aim,
    seen: Callable[[Generator], Sequence[Batch]],
    unseen: Sequence[Batch],
    *,
    accelerator: Accelerator,
    schedule: Schedule | None = None,
    frozen: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Polished:
    """Change the parameters of `merged` in place.

    Args:
        merged: in eval mode, and left so: statistics of norms stay, nothing is dropped.
        seen: deals the examples for the steps out to batches anew. Every process takes all of them, since steps of
            shared batches would be others.
        unseen: batches that judge.
        frozen: names of parameters that stay as they are.
    """
    plan = schedule or Schedule()
    aim.measure(chain(unseen, _once(seen, plan)))
    targets = [aim.said(batch) for batch in unseen]
    first = best = _mean(aim, merged, unseen, targets)
    kept, taken = _copied(merged), []
    with _trained(merged, frozen) as trained:
        batches = _endless(seen, torch.Generator().manual_seed(plan.seed))
        for k, rate in enumerate(plan.rates if trained and any(map(aim.counts, targets)) else ()):
            merged.load_state_dict(kept, strict=False)
            at = 0
            for step in _steps(merged, aim, batches, trained, plan, rate, accelerator):
                if step % plan.every == 0 or step == plan.steps:
                    now = _mean(aim, merged, unseen, targets)
                    if now < best:
                        best, kept, at = now, _copied(merged), step
                    if progress is not None:
                        progress(k * plan.steps + step, plan.steps * len(plan.rates))
            taken.append(at)
        merged.load_state_dict(kept, strict=False)
    return Polished(first, best, tuple(taken))


def polished_again(
    merged: nn.Module,
    aim: Aim,
    examples: Callable[[Generator], Sequence[Batch]],
    done: Polished,
    *,
    accelerator: Accelerator,
    schedule: Schedule | None = None,
    frozen: Collection[str] = (),
) -> None:
    """Take the steps that were kept, on all examples: none judges."""
    plan = schedule or Schedule()
    aim.measure(_once(examples, plan))
    with _trained(merged, frozen) as trained:
        batches = _endless(examples, torch.Generator().manual_seed(plan.seed))
        for rate, until in zip(plan.rates, done.steps, strict=False):
            steps = _steps(merged, aim, batches, trained, plan, rate, accelerator)
            for _ in range(until):
                next(steps)


@contextmanager
def _trained(net: nn.Module, frozen: Collection[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters that take steps; none is asked for gradients afterwards that was not before."""
    asked = {name: p.requires_grad for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        p.requires_grad_(p.is_floating_point() and name not in frozen)
    yield [p for p in net.parameters() if p.requires_grad]
    for name, p in net.named_parameters():
        p.requires_grad_(asked[name])
        p.grad = None


def _steps(
    net: nn.Module,
    aim: Aim,
    batches: Iterator[Batch],
    trained: Sequence[nn.Parameter],
    plan: Schedule,
    rate: float,
    accelerator: Accelerator,
) -> Iterator[int]:
    """A round: the number of every step that was taken."""
    # a step is less than what 16 bits tell apart, so that float32 adds the steps up
    wide = [nn.Parameter(p.detach().float()) if p.dtype in HALVES else p for p in trained]
    halves = [(master, p) for master, p in zip(wide, trained, strict=True) if master is not p]
    optimiser = torch.optim.AdamW(wide, lr=rate, weight_decay=plan.decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, plan.steps)
    for step in range(1, plan.steps + 1):
        batch = next(batches)
        said = aim.said(batch)
        for p in trained:
            p.grad = None
        with torch.enable_grad(), _can_be_trained():
            accelerator.backward(aim.loss(net, batch, said))
        for master, p in halves:
            master.grad = None if p.grad is None else p.grad.float()
        torch.nn.utils.clip_grad_norm_(wide, 1.0)
        optimiser.step()
        for master, p in halves:
            p.data.copy_(master.data)
        cosine.step()
        yield step


@contextmanager
def _can_be_trained() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MergeidError(
            f"the merged network cannot be polished, because it cannot be trained ({first_line(error)}); choose "
            "--repair solve instead"
        ) from error


def _once(seen: Callable[[Generator], Sequence[Batch]], plan: Schedule) -> Iterator[Batch]:
    """All examples, when they are asked for."""
    yield from seen(torch.Generator().manual_seed(plan.seed))


def _endless(seen: Callable[[Generator], Sequence[Batch]], generator: Generator) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from seen(generator)


@torch.no_grad()
def _mean(aim: Aim, net: nn.Module, batches: Sequence[Batch], targets: Sequence[Mapping[str, Tensor]]) -> float:
    values = [float(aim.loss(net, batch, said)) for batch, said in zip(batches, targets, strict=True)]
    value = sum(values) / max(len(values), 1)
    return value if isfinite(value) else inf


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in tensors_of(net).items()}
