"""From what the user names (file, folder, hub id, architecture, live module) to a model that runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint, open_checkpoint
from mergeid.io.lora import refuse_adapter
from mergeid.models.building import BARE, Room, build, within
from mergeid.models.loaded import Example, Loaded, ModuleAdapter, as_batch, check_runs, takes_labels
from mergeid.nn.names import is_asymmetric, plain_table, stored_keys
from mergeid.plugins import Adapter, Architecture, Batch, KnowsModules, adapter_names, get_adapter, near_names
from mergeid.request.boundary import verb

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergeid.neuron_graph.by_hand import Constraints
    from mergeid.neuron_graph.neuron_graph import NeuronGraph


def find_architecture(checkpoint: Checkpoint, arch: str | None = None) -> tuple[Adapter, Architecture]:
    """The architecture of a checkpoint: named, in its config or metadata, or read off its tensors.

    Args:
        arch: ``timm/resnet18``, ``transformers/bert``, a bare name, or the path of a config.json.

    Raises `MergeidError` when nothing fits, when several libraries do, or for an unknown name."""
    if checkpoint.files:
        refuse_adapter(checkpoint)
    config, table = stated_config(checkpoint, arch), plain_table(checkpoint.table)
    if arch is not None and not arch.endswith(".json"):
        return resolve_name(arch, table, config)
    found = []
    for name in adapter_names():
        adapter = get_adapter(name)
        with within(Room.of(table), checkpoint.source) if config is not None else nullcontext():
            match = adapter.recognise(table, config, checkpoint.metadata)
        if match is not None:
            found.append((adapter, match))
    if len(found) == 1:
        return found[0]
    if found:
        raise MergeidError(
            f"{checkpoint.source} could be any of {', '.join(a.id for _, a in found)}; say which with --arch"
        )
    hints = [h(table) for n in adapter_names() if (h := getattr(get_adapter(n), "nearest", None))]
    near = f" (nearest: {'; '.join(h for h in hints if h)})" if any(hints) else ""
    raise MergeidError(
        f"cannot tell the architecture of {checkpoint.source} from its {len(checkpoint.table)} tensors{near}; "
        f"name it with --arch (timm/NAME, transformers/TYPE or a config.json), or put its config.json beside it"
    )


def stated_config(checkpoint: Checkpoint, arch: str | None) -> dict[str, Any] | None:
    """The config that a checkpoint is built from: the file that `arch` names, else its own. Raises `MergeidError` where
    there is no such file."""
    if arch is None or not arch.endswith(".json"):
        return checkpoint.config
    from mergeid.io.reading import read_table

    if not os.path.isfile(arch):
        raise MergeidError(f"--arch {arch}: no such config file")
    return read_table(arch, "the model's config.json")


def resolve_name(
    arch: str, table: Mapping[str, Any] | None, config: Mapping[str, Any] | None
) -> tuple[Adapter, Architecture]:
    """The architecture of that name: ``adapter/name``, or a name that one adapter knows.

    Raises `MergeidError` for an unknown one, with near names."""
    prefix, _, rest = arch.partition("/")
    if rest and prefix in adapter_names():
        adapter = get_adapter(prefix)
        return adapter, adapter.resolve(rest, table, config)
    names = {n: set(get_adapter(n).architectures()) for n in adapter_names()}
    known = [n for n, names_of in names.items() if arch in names_of]
    if len(known) == 1:
        adapter = get_adapter(known[0])
        return adapter, adapter.resolve(arch, table, config)
    if known:
        raise MergeidError(
            f"{arch!r} is the name of several architectures; say {' or '.join(f'{k}/{arch}' for k in known)}"
        )
    near = [f"{n}/{x}" for n, names_of in names.items() for x in near_names(rest or arch, names_of, 3)]
    raise MergeidError(
        f"unknown architecture {arch!r}; "
        + (f"did you mean {', '.join(near)}?" if near else f"expected ADAPTER/NAME, ADAPTER one of {', '.join(names)}")
    )


@verb
def load(
    source: str | os.PathLike[str] | Checkpoint | nn.Module,
    *,
    arch: str | None = None,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Loaded:
    """A runnable model with its weights.

    Args:
        source: ``.safetensors`` file, folder, hub id, an open checkpoint, or a live module.
        arch: its architecture where it cannot be told.
        example_inputs: for a live module of no known library: a tensor, a tuple, or a dict of keywords.
        outputs: names or globs of those outputs of a live module that count (``"logits"``, ``"0"``); default: all.
        seed: of the example inputs.

    Raises:
        MergeidError: not found, not recognised, or weights that do not fit the architecture.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    if isinstance(source, torch.nn.Module):
        return _live(source, arch, Example.of(example_inputs, outputs), generator)
    if outputs:
        raise MergeidError(f"outputs= chooses among what a live module returns, but {source} is a path; leave it out")
    checkpoint = open_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
    adapter, found = find_architecture(checkpoint, arch)
    return load_checkpoint(checkpoint, adapter, found, device=device, generator=generator)


def load_checkpoint(
    checkpoint: Checkpoint, adapter: Adapter, arch: Architecture, *, device: str, generator: torch.Generator
) -> Loaded:
    """Build the architecture and put the checkpoint's weights into it; layers that are asymmetric in the checkpoint are
    so in the model.

    Raises `MergeidError` when a floating-point tensor of the model is missing or has another shape."""
    model = build(adapter, arch, Room.of(checkpoint.table), device=device)
    names = adapter.tensor_names(arch, model, plain_table(checkpoint.table))
    if is_asymmetric(checkpoint.table):
        from mergeid.nn.stored import restore

        names = stored_keys(checkpoint.table, names)
        restore(model, {key: checkpoint.tensor(name) for name, key in names.items()})
    own = model.state_dict()
    state = {}
    for name, key in names.items():
        value = checkpoint.tensor(name)
        if key in own and tuple(value.shape) != tuple(own[key].shape):
            raise MergeidError(
                f"tensor {name!r} of {checkpoint.source} has shape {tuple(value.shape)}, but {arch.id} expects "
                f"{tuple(own[key].shape)}; name its architecture with --arch"
            )
        state[key] = value.to(own[key].dtype) if key in own else value
    result = model.load_state_dict(state, strict=False)
    for name in names:
        checkpoint.release(name)  # the model has copies
    tied = _tied(model)
    missing = [k for k in result.missing_keys if own[k].is_floating_point() and not tied.get(k, set()) & set(state)]
    if missing:
        raise MergeidError(
            f"{checkpoint.source} lacks {len(missing)} of the {len(own)} tensors of {arch.id} (first: {missing[0]!r}); "
            "name its architecture with --arch"
        )
    model = model.to(device).eval()
    example = adapter.example_inputs(arch, model, generator)
    return Loaded(checkpoint.source, model, adapter, arch, checkpoint, names, example)


def _tied(model: nn.Module) -> dict[str, set[str]]:
    """Key -> all keys that share its storage."""
    groups: dict[int, set[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), set()).add(key)
    return {k: g for g in groups.values() for k in g}


def opened(source: str | os.PathLike[str] | Checkpoint | nn.Module, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of a file, folder or hub id; for a live module one that holds its tensors, and its config where it
    says of itself what a ``config.json`` says."""
    if isinstance(source, (str, os.PathLike, Checkpoint)):
        return open_checkpoint(source, allow_pickle=allow_pickle)
    from mergeid.models.offload import state_of

    to_dict: Callable[[], dict[str, Any]] | None = getattr(getattr(source, "config", None), "to_dict", None)
    config = to_dict() if to_dict else None
    return Checkpoint.from_tensors(state_of(source), source=type(source).__name__, config=config)


def _live(module: nn.Module, arch: str | None, given: Example, generator: torch.Generator) -> Loaded:
    from mergeid.models.offload import in_memory

    source = type(module).__name__
    try:
        module = in_memory(module).eval()
    except NotImplementedError as error:
        raise MergeidError(
            f"{source} cannot be put into evaluation mode ({error}); give the module that it was exported from"
        ) from error
    names = {k: k for k in module.state_dict()}
    if given.inputs is not None and arch is None:
        example = as_batch(given.inputs)
        library = _library(module)
        # the models of a library take their targets under this name
        adapter: Any = ModuleAdapter(library, takes_labels=library is None and takes_labels(module, example))
        return Loaded(source, module, adapter, Architecture("torch", source), None, names, example, given.outputs)
    try:
        adapter, found = find_architecture(opened(module), arch)
    except MergeidError as error:
        raise MergeidError(f"{error}; for a live module also: pass example_inputs") from None
    inputs = given.inputs
    example = as_batch(inputs) if inputs is not None else adapter.example_inputs(found, module, generator)
    return Loaded(source, module, adapter, found, None, names, example, given.outputs)


def _library(module: nn.Module) -> KnowsModules | None:
    """The adapter whose library the module comes from."""
    known = (get_adapter(name) for name in adapter_names())
    return next((a for a in known if isinstance(a, KnowsModules) and a.owns(module)), None)


def _of_config(path: str, config: Mapping[str, Any]) -> tuple[Adapter, Architecture]:
    """The architecture that a config.json alone describes. Raises `MergeidError` where it does not say which."""
    for name in adapter_names():
        adapter = get_adapter(name)
        with within(BARE, path):
            found = adapter.recognise({}, config, {})
        if found is not None:
            return adapter, found
    raise MergeidError(
        f'{path} names no architecture; expected a config.json with "model_type" (transformers) or "architecture" '
        "(timm)"
    )


def bare(arch: str, *, seed: int = 0) -> Loaded:
    """A model of that architecture (a name, or the path of a config.json) with random weights; on the meta device
    where it is too large to be run here and its adapter can make a smaller one to verify."""
    import torch

    if arch.endswith(".json"):
        from mergeid.io.reading import read_table

        adapter, found = _of_config(arch, read_table(arch, "the model's config.json"))
    else:
        adapter, found = resolve_name(arch, None, None)
    model = build(adapter, found, BARE, device="meta")
    size = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if size < HUGE or not hasattr(adapter, "shrink"):
        model = build(adapter, found, BARE)
    model = model.eval()
    example = adapter.example_inputs(found, model, torch.Generator().manual_seed(seed))
    return Loaded(arch, model, adapter, found, None, {k: k for k in model.state_dict()}, example)


HUGE = 1_000_000_000
"""Parameters above which a bare architecture is traced on the meta device."""
LARGE = 400_000_000
"""Parameters above which verification runs in float32: a float64 copy would not fit beside the model."""


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

    from mergeid.data.nested import mapped
    from mergeid.io.memory import give_back
    from mergeid.neuron_graph.by_hand import fitted
    from mergeid.neuron_graph.recorder import Pass
    from mergeid.neuron_graph.trace import trace
    from mergeid.neuron_graph.verify import verify

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
    with _blamed(loaded, more):
        if given is not None:
            state = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
            graph = fitted(given, state, loaded.arch.id)
        else:
            inputs = moved(batch)
            graph = trace(
                model,
                inputs,
                lambda: loaded.outputs(model, inputs),
                values=batch if meta else None,
                more=[Pass(y := moved(x), partial(loaded.outputs, model, y), x if meta else None) for x in more],
                constraints=constraints,
                name=loaded.arch.id,
                label=lambda axes: loaded.adapter.space_label(loaded.arch, axes),
            )
        if meta:
            return _proven_small(loaded, graph, seed, samples)
        found = verify(
            graph,
            model,
            [batch, *more],
            lambda probe, given: [loaded.outputs(probe, x) for x in given],
            generator=torch.Generator().manual_seed(seed),
            samples=samples,
            dtype=torch.float64 if size < LARGE else torch.float32,
        ).graph
    give_back()  # a copy of the model, in float64
    return found


@contextmanager
def _blamed(loaded: Loaded, more: Sequence[Batch]) -> Iterator[None]:
    """Whatever goes wrong meanwhile is the model's fault, and said in a sentence, where it does not run by itself."""
    try:
        yield
    except MergeidError:
        raise
    except Exception:
        if not any(p.is_meta for p in loaded.model.parameters()):
            check_runs(loaded, loaded.inputs, "example_inputs" if loaded.checkpoint is None else "its example inputs")
            for i, batch in enumerate(more):
                check_runs(loaded, batch, f"more_inputs[{i}]")
        raise
