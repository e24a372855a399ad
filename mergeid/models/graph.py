"""The neuron graph of a loaded model: traced, and proven on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from mergeid.basics.memory import SMALL_NETWORK, give_back
from mergeid.errors import MergeidError
from mergeid.models.loaded import Loaded, check_runs
from mergeid.plugins import Architecture, Batch

if TYPE_CHECKING:
    from mergeid.neuron_graph.by_hand import Constraints
    from mergeid.neuron_graph.neuron_graph import NeuronGraph

LARGE = 400_000_000
"""Parameters above which verification runs in float32: a float64 copy would not fit beside the model."""


def graph_of(
    loaded: Loaded,
    *,
    seed: int = 0,
    samples: int = 2,
    more: Sequence[Batch] = (),
    constraints: Constraints | None = None,
    given: NeuronGraph | None = None,
) -> NeuronGraph:
    """The verified neuron graph of a loaded model, over the keys of its state dict.

    Args:
        more: further batches that drive what the example does not; the graph is verified on them too.
        constraints: what is known of the neurons besides.
        given: a graph to verify instead of tracing one.

    Raises `MergeidError` where constraints or the given graph do not fit the model."""
    import torch

    from mergeid.basics.casting import holds_numbers
    from mergeid.basics.nested import mapped
    from mergeid.neuron_graph.by_hand import fitted
    from mergeid.neuron_graph.verify import Verification, verify

    model, batch = loaded.model, loaded.inputs
    size = sum(p.numel() for p in model.parameters())
    meta = any(p.is_meta for p in model.parameters())

    def moved(x: Batch) -> Batch:  # a copy: models may write into their inputs
        return mapped(x, lambda t: t.to("meta") if meta else t.clone())

    if given is not None and meta:
        raise MergeidError(
            f"{loaded.source} has no weights here (it is too large to run), so a graph written by hand cannot be "
            "verified on it; give a smaller model of this architecture"
        )
    shared = False
    with _blamed(loaded, more):
        if given is not None:
            state = {k: tuple(v.shape) for k, v in loaded.state().items() if holds_numbers(v)}
            graph: NeuronGraph | None = fitted(given, state, loaded.arch.id)
        else:
            alike = size > SMALL_NETWORK and not more and constraints is None
            again = _traced(loaded, moved, (), None, alike=True) if alike else None
            shared = again is not None
            graph = again or _traced(loaded, moved, more, constraints)
            if graph is not None and not meta:
                graph, more = _reaching(loaded, graph, partial(_traced, loaded, moved), (more, constraints), seed)
        assert graph is not None
        if meta:
            return _proven_small(loaded, graph, seed, samples)

        def proven(graph: NeuronGraph) -> Verification:
            return verify(
                graph,
                model,
                [batch, *more],
                lambda probe, given: [loaded.whole_outputs(probe, x) for x in given],
                generator=torch.Generator().manual_seed(seed),
                samples=samples,
                dtype=torch.float64 if size < LARGE else torch.float32,
            )

        found = proven(graph)
        if shared and found.failed:  # layers that look alike are not
            whole = _traced(loaded, moved, more, constraints)
            assert whole is not None
            found = proven(whole)
    give_back()  # a copy of the model, in float64
    return found.graph


def _traced(
    loaded: Loaded,
    moved: Callable[[Batch], Batch],
    more: Sequence[Batch],
    constraints: Constraints | None,
    *,
    alike: bool = False,
) -> NeuronGraph | None:
    """A traced graph, of one layer of each kind where layers are `alike`; None where that is not to be had.

    Args:
        moved: copies a batch to where the model is.
    """
    from mergeid.neuron_graph.recording import Pass
    from mergeid.neuron_graph.trace import trace, trace_repeated

    model, inputs = loaded.model, moved(loaded.inputs)
    meta = any(p.is_meta for p in model.parameters())
    values = loaded.inputs if meta else None

    def forward() -> object:
        return loaded.whole_outputs(model, inputs)

    def label(axes: list[tuple[str, int]]) -> str | None:
        return loaded.adapter.space_label(loaded.arch, axes)

    if alike:
        return trace_repeated(model, inputs, forward, values=values, name=loaded.arch.id, label=label)
    passes = [Pass(y := moved(x), partial(loaded.whole_outputs, model, y), x if meta else None) for x in more]
    return trace(
        model, inputs, forward, values=values, more=passes, constraints=constraints, name=loaded.arch.id, label=label
    )


def _reaching(
    loaded: Loaded,
    graph: NeuronGraph,
    traced: Callable[[Sequence[Batch], Constraints | None], NeuronGraph | None],
    given: tuple[Sequence[Batch], Constraints | None],
    seed: int,
) -> tuple[NeuronGraph, Sequence[Batch]]:
    """A graph of inputs that reach all layers of a kind, with what was run besides the example, as far as the adapter
    has such inputs; a warning names those that are left.

    Args:
        traced: (further batches, constraints) -> a graph.
        given: with which `graph` was traced.
    """
    from mergeid.models.reached import unreached, warn_of, wider_examples

    more, constraints = given
    left = unreached(graph, loaded)
    for batch in wider_examples(loaded, seed) if left else ():
        wider = [*more, batch]
        again = traced(wider, constraints)
        if again is None or len(now := unreached(again, loaded)) >= len(left):
            continue
        graph, more, left = again, wider, now
        if not left:
            break
    if left:
        warn_of(left, loaded)
    return graph, more


def _proven_small(loaded: Loaded, graph: NeuronGraph, seed: int, samples: int) -> NeuronGraph:
    """A graph traced on the meta device, verified on a smaller model of the same architecture."""
    import torch

    from mergeid.neuron_graph.scale import proven_on

    shrink: Callable[[Architecture], Architecture] | None = getattr(loaded.adapter, "shrink", None)
    if shrink is None:
        raise MergeidError(
            f"{loaded.source} is on the meta device, and adapter {loaded.adapter.name!r} cannot make a smaller model "
            "to verify its graph on; load its weights first"
        )
    arch = shrink(loaded.arch)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = loaded.adapter.build(arch)
    example = loaded.adapter.example_inputs(arch, model, torch.Generator().manual_seed(seed))
    small = Loaded(arch.id, model, loaded.adapter, arch, None, {k: k for k in model.state_dict()}, example)
    count = sum(p.numel() for p in model.parameters())
    what = f"a smaller model of the same code ({count / 1e6:.1f}M parameters)"
    return proven_on(graph, graph_of(small, seed=seed, samples=samples), what)


@contextmanager
def _blamed(loaded: Loaded, more: Sequence[Batch]) -> Iterator[None]:
    """Whatever goes wrong meanwhile is the model's fault, and said in a sentence, where it does not run by itself."""
    try:
        yield
    except MergeidError:
        raise
    except Exception:
        if not any(p.is_meta for p in loaded.model.parameters()):
            check_runs(
                loaded,
                loaded.inputs,
                "example_inputs" if loaded.checkpoint is None else "the inputs that mergeid makes for it",
            )
            for i, batch in enumerate(more):
                check_runs(loaded, batch, f"more_inputs[{i}]")
        raise
