"""What a model leaves behind on a fixed set of inputs, so that it can be compared with any other without running again.

A sketch holds activations of every space at sampled places, outputs, a hash of every weight matrix (for distances in
the order of the neurons as it lies), and the model's *response*: how much its own loss rises when the neurons of all
spaces are at once replaced by what averaging with a partner of correlation ρ would leave of them,

    h -> mean + (1 + ρ) / 2 (h - mean) + sqrt((1 - ρ²) / 4) σ z,  z normal,

which has the variance (1 + ρ) / 2 σ² of an average. A repaired merge brings the variance back to σ².
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from mergeid.basics.nested import examples_in
from mergeid.basics.on_demand import PIECE, in_pieces
from mergeid.basics.reading import check_regular, parse_json
from mergeid.basics.state import tensors_of
from mergeid.data.batches import input_dtype, to_model
from mergeid.errors import MergeidError, listed, shown
from mergeid.evidence.activations import TapReader, real_tokens, sample_rows
from mergeid.evidence.taps import Key, choose_taps
from mergeid.io.publish import whole_file, write_text
from mergeid.models.loaded import Loaded
from mergeid.models.running import eval_mode, fits_the_model
from mergeid.neuron_graph.exchange import check_graph, space_of
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space, TapMap
from mergeid.prediction.features import expected

FORMAT = "mergeid.sketch/1"
EXAMPLES = 256
"""Inputs that a sketch is made of."""
PER_EXAMPLE = 2
"""Places (pixels, tokens) of an input whose activations are kept."""
RESPONDING = 64
"""Inputs that the response is measured on."""
BATCH = 32
LEVELS = (0.0, 0.005, 0.02, 0.06, 0.15, 0.3, 0.5, 0.75, 1.0)
"""1 - ρ at which it is measured."""
BUCKETS = 256
"""Length of the hash of a weight matrix."""
IN_JSON = ("spaces", "names", "repairable", "config")
"""Entries of a sketch's metadata that are JSON inside a text."""
BEYOND = 1e18
"""Activations of this size have squares that float32 cannot add up."""
LOGITS = 1 << 22
"""Numbers of the outputs that are kept at most."""


@dataclass
class Sketch:
    """Attributes:
    source, arch: whose. inputs: digest of the inputs: sketches of other inputs do not compare.
    spaces: the graph's spaces without their axes.
    activations: space id -> float32 [rows, neurons on the tap]; members: space id -> int64 [neurons], which is which.
    logits: float32 [rows, classes].
    hashes: float32 [matrices, buckets], ⟨hash of X, hash of Y⟩ ≈ ⟨X, Y⟩ (Charikar et al. 2002); names: of the matrices.
    response: float64 [levels, 2 (as averaged, repaired), 2 (nats, share of right predictions lost)].
    repairable: whether the model stores statistics of normalisation.
    config: what its ``config.json`` says, None without one.
    """

    source: str
    arch: str
    inputs: str
    spaces: list[Space]
    activations: dict[str, Tensor]
    members: dict[str, Tensor]
    logits: Tensor
    names: list[str]
    hashes: Tensor
    response: Tensor
    repairable: bool
    config: dict[str, Any] | None = None

    @property
    def graph(self) -> NeuronGraph:
        """The group of the spaces, without tensors."""
        return NeuronGraph(self.arch, {}, self.spaces, [])


def make_sketch(
    loaded: Loaded,
    graph: NeuronGraph,
    examples: Sequence[Any],
    collate: Callable[[Any], Any] | None = None,
    *,
    limit: int = EXAMPLES,
    progress: Callable[[int, int], None] | None = None,
) -> Sketch:
    """One pass over the inputs, and a pass over a few of them for every level of the response.

    Args:
        graph: the model's verified graph, with taps.
        examples: map-style; labels are not looked at. limit: most of them, evenly spaced.

    Raises `MergeidError` for data that does not fit and for outputs that are no logits."""
    model, count = loaded.model, len(examples)
    chosen: Any = examples if count <= limit else Subset(examples, [k * count // limit for k in range(limit)])  # type: ignore[arg-type]
    batches = _Batches(loaded, chosen, collate)
    taps = {s: found[0] for s, found in choose_taps(graph, model, most=1).items()}
    reader = TapReader(model, loaded.forward, list(taps.values()))
    outputs: list[Tensor] = []
    reader.forward = lambda m, x: outputs.append(loaded.forward(m, x))
    rows: dict[str, list[Tensor]] = {s: [] for s in taps}
    logits: list[Tensor] = []
    digest, done = hashlib.sha256(), 0
    with eval_mode(model):
        for batch, mask in batches:
            if progress:
                progress(done, len(chosen))
            n = examples_in(batch)
            with fits_the_model(batch):
                read = reader(batch, partial(_taken, taps, torch.arange(done, done + n), mask))
            for key in sorted(batch):
                if isinstance(batch[key], Tensor):
                    digest.update(key.encode())
                    digest.update(batch[key].detach().cpu().contiguous().numpy().tobytes())
            for space, values in (pair for found in read.values() for pair in found.items()):
                rows[space].append(values)
            logits.append(_sampled(outputs.pop(), mask, done))
            done += n
        own = _predictions(loaded, batches)
        response = torch.stack([_response(loaded, batches, own, list(taps.values()), level) for level in LEVELS])
    kept = {s: torch.cat(found) for s, found in rows.items() if found}
    out = torch.cat(logits).float().cpu()
    state = {k: v for k, v in tensors_of(model).items() if v.is_floating_point() and v.dim() >= 2}
    return Sketch(
        loaded.source,
        loaded.arch.id,
        digest.hexdigest()[:32],
        [Space(s.id, s.label, s.size, s.blocks, s.parents, s.block_parents, ()) for s in graph.spaces],
        kept,
        {s: torch.from_numpy(taps[s].index[taps[s].index >= 0]) for s in kept},
        out[: max(1, LOGITS // out.shape[1])],
        list(state),
        torch.stack([_hash(k, v) for k, v in state.items()]) if state else torch.zeros(0, BUCKETS),
        response,
        repairable(model),
    )


def _taken(taps: Mapping[str, TapMap], ids: Tensor, mask: Tensor | None, key: Key, value: Tensor) -> dict[str, Tensor]:
    """Space -> sampled rows of what was seen at a tap."""
    return {
        space: sample_rows(value, tap, ids, mask, PER_EXAMPLE, 0).values
        for space, tap in taps.items()
        if (tap.module, tap.kind, tap.call) == key and value.dim() == tap.ndim
    }


def repairable(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None for m in model.modules())


class _Batches:
    """Inputs in batches of a fixed size, with their masks; several passes."""

    def __init__(self, loaded: Loaded, examples: Any, collate: Callable[[Any], Any] | None) -> None:
        self.examples, self.join = examples, collate or torch.utils.data.default_collate
        self.inputs_of = loaded.inputs_of
        self.device = next((p.device for p in loaded.model.parameters()), torch.device("cpu"))
        self.dtype = input_dtype(loaded.model)

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        return self.upto(len(self.examples))

    def upto(self, count: int) -> Iterator[tuple[Any, Tensor | None]]:
        for start in range(0, min(count, len(self.examples)), BATCH):
            items = [self.examples[i] for i in range(start, min(start + BATCH, count, len(self.examples)))]
            batch = to_model(self.join(items), self.device, self.dtype)
            yield self.inputs_of(batch), real_tokens(batch)


def _sampled(out: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """[rows, classes]: at most `PER_EXAMPLE` positions of every example."""
    if out.dim() < 2 or out.shape[-1] < 2 or not out.is_floating_point():
        raise MergeidError(f"the outputs have shape {list(out.shape)}, which are not class logits")
    if out.dim() == 2:
        return out.detach()
    flat = out.detach().reshape(len(out), -1, out.shape[-1])
    n = flat.shape[1]
    tap = TapMap("", "out", 0, 3, (2,), np.arange(out.shape[-1]))
    fitting = mask if mask is not None and mask.shape[1] == n else None
    return sample_rows(flat, tap, torch.arange(first, first + len(flat)), fitting, PER_EXAMPLE, 0).values


def _hash(name: str, value: Tensor) -> Tensor:
    """Signed sums of the entries over buckets that depend on the name and the place alone, float32 [buckets]."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    total = torch.zeros(BUCKETS, dtype=torch.float64)
    for (rows,) in in_pieces(value.detach()):
        for part in rows.reshape(-1).split(PIECE):
            codes = torch.randint(2 * BUCKETS, part.shape, generator=generator, dtype=torch.int32)
            total.index_add_(0, (codes // 2).long(), part.cpu().double() * (1 - 2 * (codes % 2)))
    return total.float()


def _predictions(loaded: Loaded, batches: _Batches) -> list[Tensor]:
    """Log-probabilities float64 [rows, classes] of the undisturbed network on those batches that the response is of."""
    found, count = [], 0
    for batch, mask in batches.upto(RESPONDING):
        with torch.no_grad():
            found.append(_sampled(loaded.forward(loaded.model, batch), mask, count).double().log_softmax(-1))
        count += examples_in(batch)
    return found


def _response(
    loaded: Loaded, batches: _Batches, undisturbed: Sequence[Tensor], taps: Sequence[TapMap], level: float
) -> Tensor:
    """[2, 2] float64: mean cross-entropy above its own entropy against the undisturbed prediction, and the share of its
    probability that the disturbed prediction no longer finds; as averaged, and with the variance repaired."""
    total, count = torch.zeros(2, 2, dtype=torch.float64), 0
    for (batch, mask), own in zip(batches.upto(RESPONDING), undisturbed, strict=True):
        target = own.exp()
        for k, repaired in enumerate((False, True)):
            generator = torch.Generator().manual_seed(count)
            with torch.no_grad(), _disturbed(loaded.model, taps, 1 - level, repaired, generator):
                out = _sampled(loaded.forward(loaded.model, batch), mask, count).double()
            total[k, 0] += float(expected(target, own - out.log_softmax(-1)).sum()) / (len(own) / examples_in(batch))
            right = target.amax(-1) - target.gather(-1, out.argmax(-1, keepdim=True))[:, 0]
            total[k, 1] += float(right.sum()) / (len(own) / examples_in(batch))
        count += examples_in(batch)
    return total / max(count, 1)


@contextmanager
def _disturbed(
    model: nn.Module, taps: Sequence[TapMap], rho: float, repaired: bool, generator: torch.Generator
) -> Iterator[None]:
    """While open, the activations at the taps are what averaging with a partner would leave of them."""
    signal, noise = (1 + rho) / 2, max(1 - rho * rho, 0.0) ** 0.5 / 2
    scale = 1 / max(signal**2 + noise**2, 1e-12) ** 0.5 if repaired else 1.0

    def change(x: Tensor, tap: TapMap) -> Tensor:
        rest = [d for d in range(x.dim()) if d not in tap.dims]
        mean, std = x.mean(rest, keepdim=True), x.std(rest, keepdim=True, correction=0)
        drawn = torch.randn(x.shape, generator=generator).to(x)
        answer: Tensor = mean + scale * (signal * (x - mean) + noise * std * drawn)
        return answer

    def fits(value: Any, tap: TapMap) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == tap.ndim

    def before(tap: TapMap) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            return (change(args[0], tap), *args[1:]) if args and fits(args[0], tap) else None

        return hook

    def after(tap: TapMap) -> Callable[..., Any]:
        return lambda module, args, out: change(out, tap) if fits(out, tap) else None

    handles = []
    for tap in taps:
        module = model.get_submodule(tap.module)
        handles.append(
            module.register_forward_pre_hook(before(tap))
            if tap.kind == "in"
            else module.register_forward_hook(after(tap))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_sketch(sketch: Sketch, path: Path) -> Path:
    """Whole or not at all. Raises `MergeidError` where it cannot be written."""
    from safetensors.torch import save

    from mergeid.io.header import in_order

    tensors = {f"activations.{k}": v.contiguous() for k, v in sketch.activations.items()}
    tensors |= {f"members.{k}": v.contiguous() for k, v in sketch.members.items()}
    tensors |= {"logits": sketch.logits.contiguous(), "hashes": sketch.hashes, "response": sketch.response}
    spaces = [
        {"id": s.id, "label": s.label, "size": s.size, "blocks": s.blocks, "parents": s.parents}
        | {"block_parents": s.block_parents.tolist()}
        for s in sketch.spaces
    ]
    about = {
        "format": FORMAT,
        "source": sketch.source,
        "arch": sketch.arch,
        "inputs": sketch.inputs,
        "spaces": json.dumps(spaces),
        "names": json.dumps(sketch.names),
        "repairable": json.dumps(sketch.repairable),
        **({"config": json.dumps(sketch.config, default=str)} if sketch.config is not None else {}),
    }
    with whole_file(path, "-o") as partial:
        write_text(partial, in_order(save(tensors, metadata=about)))
    return path


def load_sketch(path: Path) -> Sketch:
    """Raises `MergeidError` for a file that is no sketch."""
    from safetensors import safe_open

    from mergeid.io.header import read_header
    from mergeid.io.schema import SketchAbout, validated

    check_regular(path, "a file made by mergeid sketch")
    about = read_header(path).metadata
    if about.get("format") != FORMAT:
        raise MergeidError(
            f"{path} is not a sketch; make one with: mergeid sketch MODEL --data DATA -o {path.stem}.sketch"
        )
    said = {k: parse_json(v, f"{path}, {k}", own=True) if k in IN_JSON else v for k, v in about.items()}
    told = validated(SketchAbout, {k: v for k, v in said.items() if k != "format"}, str(path))
    with safe_open(str(path), "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    made = Sketch(
        told.source,
        told.arch,
        told.inputs,
        [space_of(s) for s in told.spaces],
        _under("activations.", tensors),
        _under("members.", tensors),
        tensors.get("logits", torch.empty(0)),
        told.names,
        tensors.get("hashes", torch.empty(0)),
        tensors.get("response", torch.empty(0)),
        told.repairable,
        told.config,
    )
    _check(made, path)
    return made


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check(sketch: Sketch, path: Path) -> None:
    """Raises `MergeidError` where the tensors of a sketch are not of the kinds and shapes that belong together."""
    sizes, rows = {s.id: s.size for s in sketch.spaces}, len(sketch.logits) if sketch.logits.dim() == 2 else 0
    shapes = {
        "logits": (sketch.logits, torch.float32, (rows, sketch.logits.shape[-1] if rows else 0)),
        "hashes": (sketch.hashes, torch.float32, (len(sketch.names), BUCKETS)),
        "response": (sketch.response, torch.float64, (len(LEVELS), 2, 2)),
    }
    wrong = [k for k, (v, dtype, shape) in shapes.items() if v.dtype != dtype or v.shape != shape or not rows]
    for space, values in sketch.activations.items():
        members = sketch.members.get(space, torch.empty(0))
        fits = values.dim() == 2 and members.dtype == torch.int64 and members.shape == values.shape[1:]
        if not fits or values.dtype != torch.float32 or space not in sizes or not _among(members, sizes[space]):
            wrong.append(f"activations of space {shown(space)}")
    if wrong:
        raise MergeidError(f"{path} is a damaged sketch ({listed(wrong, 3)} of the wrong kind or shape); make it again")
    numbers = (sketch.logits, sketch.hashes, sketch.response, *sketch.activations.values())
    if not all(bool((v.abs() < BEYOND).all()) for v in numbers):  # also where one is no number
        raise MergeidError(
            f"{path} holds numbers that are not finite or beyond {BEYOND:g}; make the sketch of a model whose "
            "activations are in range"
        )
    try:
        check_graph(sketch.graph)
    except MergeidError as error:
        raise MergeidError(f"{path} is a damaged sketch: {error}") from None


def _among(members: Tensor, size: int) -> bool:
    return bool(((members >= 0) & (members < size)).all())
