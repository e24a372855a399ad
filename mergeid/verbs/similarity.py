"""How alike the layers of two models are on the same data: a table of pairs and a map of all against all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from mergeid.errors import MergeidError
from mergeid.io.opening import Source
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import LIMIT, Calibration, Example, Progress, Reading, Run
from mergeid.results.similarity import LayerSimilarity, SimilarityResult

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from mergeid.evidence.similarity import PairRows, PairSums
    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded

Kept = TypeVar("Kept")

BUDGET = 1 << 30
"""Bytes of sums that are kept at once; more layers take more passes over the data. Of a layer whose sums are larger by
themselves, and that has more rows than fit, fewer positions are looked at."""


@verb
def similarity(
    a: Source,
    b: Source,
    *,
    data: Annotated[
        Any,
        o.examples(
            "Examples to run both models on: image folder, text or jsonl file, .npz or .safetensors with inputs, "
            "Hugging Face dataset, or module:function."
        ),
    ],
    layers: Annotated[
        Sequence[str],
        o.Option(
            "Modules to compare (repeatable). Default: all that have a weight matrix.",
            o.INPUT,
            "GLOB",
            several=True,
        ),
    ] = ("*",),
    arch: o.Arch = None,
    limit: o.Limit = LIMIT,
    image_size: o.ImageSize = None,
    per_example: int = 32,
    batch_size: o.BatchSize = 32,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    allow_pickle: o.AllowPickle = False,
    dequantise: o.Dequantise = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> SimilarityResult:
    """CKA, SVCCA and PWCCA between the layers of two models on the same data.

    The layers are the modules with a matrix of weights (linear, convolutional, embedding), in forward order, and what
    is compared are their outputs: neurons are columns, positions (pixels, tokens without padding) of examples are rows.
    The models need not be of one architecture; the table has the layers of equal name, the map all.

    Args:
        a, b: files, folders, hub ids or live modules.
        data: examples, see `mergeid.data.load_data`; labels are not looked at.
        layers: globs of the modules to compare.
        limit: most examples.
        image_size: height and width of the data's images; None: the model's own.
        per_example: most positions of an example, drawn with `seed`.

    Raises `MergeidError` for anything wrong with the input.
    """
    run = Run.of(progress, device=device, seed=seed, batch_size=batch_size)
    example = Example.of(example_inputs)
    reading = Reading(arch, allow_pickle=allow_pickle, dequantise=dequantise, example=example, image_size=image_size)
    bench = Workbench(reading, run)
    one = bench.load(a)
    two = bench.load(b).apart_from(one)
    from mergeid.models.examples import enough

    examples = enough(bench.examples(Calibration(data, limit), one), 4, "to compare layers")
    runs = _Runs((one, two), examples, per_example, run)
    names_a, names_b = (_chosen(runs.shapes(i), layers, loaded) for i, loaded in enumerate((one, two)))
    found = runs.map(names_a, names_b)
    common = [n for n in names_a if n in set(names_b)]
    notes = []
    table: list[LayerSimilarity] = []
    for group in runs.groups(common):
        for name, sums in runs.sums(group).items():
            sizes = runs.shapes(0)[name], runs.shapes(1)[name]
            if sums is None or sums.count < 4:
                notes.append(f"layer {name} has a different number of positions in each model and is left out")
                continue
            table.append(
                LayerSimilarity(name, sizes, sums.count, sums.cka(), sums.cka_unbiased(), sums.svcca(), sums.pwcca())
            )
    scarce = [layer.layer for layer in table if layer.rows < 5 * max(layer.neurons)]
    if scarce:
        notes.append(
            f"{len(scarce)} layers have fewer than 5 rows per neuron (first: {scarce[0]}): their plain CKA, SVCCA and "
            "PWCCA are too high; use more examples, or rely on the unbiased CKA"
        )
    return SimilarityResult(one.source, two.source, len(examples), table, names_a, names_b, found, notes)


def _chosen(shapes: Mapping[str, int], layers: Sequence[str], loaded: Loaded) -> list[str]:
    if not shapes:
        raise MergeidError(f"no layer of {loaded.source} gives a row per example of the data, so none can be compared")
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise MergeidError(
                f"--layers {pattern!r} matches no layer of {loaded.source}; its layers are "
                f"{', '.join(list(shapes)[:3])}, …"
            )
    return [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in layers or ("*",))]


@dataclass
class _Runs:
    """Passes of both models over the data."""

    models: tuple[Loaded, Loaded]
    examples: Examples
    per_example: int
    run: Run
    _shapes: dict[int, dict[str, int]] = field(default_factory=dict)

    def batches(self, stage: str) -> Iterator[Any]:
        batches = self.examples.batches(self.run.batch_size)
        for i, batch in enumerate(batches):
            self.run.tell(stage, i, len(batches))
            yield batch

    def outputs(
        self, which: int, names: Sequence[str], batch: Any, take: Callable[[str, Tensor], Kept]
    ) -> dict[str, Kept]:
        """What `take` makes of the outputs [examples, positions, neurons] of the layers that this batch calls, in
        forward order. It must keep no view of them."""
        import torch

        from mergeid.basics.nested import examples_in
        from mergeid.data.batches import input_dtype, to_model
        from mergeid.models.running import eval_mode, fits_the_model

        loaded = self.models[which]
        batch = to_model(batch, torch.device(self.run.place), input_dtype(loaded.model))
        size = examples_in(batch)
        found: dict[str, Kept] = {}

        def see(name: str, x: Tensor) -> None:
            if name not in found and x.numel() and x.shape[0] % size == 0:
                x = x.reshape(size, -1, x.shape[-1])
                if (mask := _mask(x, batch)) is not None:
                    x = x.masked_fill(~mask.to(x.device)[..., None], 0.0)
                if not bool(x.isfinite().all()):
                    raise MergeidError(
                        f"layer {name} of {loaded.source} puts out NaN or infinite numbers on the data, so it cannot "
                        "be compared; check the weights and the data, or choose other layers with --layers"
                    )
                found[name] = take(name, x)

        with _hooks(loaded.model, names, see), eval_mode(loaded.model), torch.no_grad(), fits_the_model(batch):
            loaded.forward(loaded.model, batch)
        return found

    def shapes(self, which: int) -> dict[str, int]:
        """Layer -> its number of neurons, in forward order."""
        if which not in self._shapes:
            from mergeid.basics.hooks import heard

            first = next(self.batches("reading the layers"))
            names = [n for n, m in heard(self.models[which].model) if _has_matrix(m)]
            self._shapes[which] = self.outputs(which, names, first, lambda _, x: x.shape[-1])
        return self._shapes[which]

    def needed(self, name: str) -> tuple[int, int]:
        """Bytes of the sums over the rows of a layer, and of the products of its rows."""
        p, q, n = self.shapes(0)[name], self.shapes(1)[name], len(self.examples) * self.per_example
        return 8 * (p * p + q * q + p * q), 24 * n * n

    def positions(self, name: str) -> int:
        """Most positions of an example that are looked at."""
        fewest = max(int((BUDGET / 24) ** 0.5) // len(self.examples), 1)
        return min(self.per_example, fewest) if min(self.needed(name)) > BUDGET else self.per_example

    def groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Layers whose sums fit the budget, one pass each."""
        group: list[str] = []
        size = 0
        for name in names:
            sums, products = self.needed(name)
            needed = sums if sums <= min(products, BUDGET) else 0  # rows lie on disk
            if group and size + needed > BUDGET:
                yield group
                group, size = [], 0
            group.append(name)
            size += needed
        if group:
            yield group

    def sums(self, names: Sequence[str]) -> dict[str, PairSums | PairRows | None]:
        """Sums over rows of each layer, or its rows where these are fewer than its neurons; None where the positions of
        the two models do not correspond."""
        from mergeid.basics.shelf import Shelf
        from mergeid.evidence.similarity import PairRows, PairSums

        few = {name for name in names if self.needed(name)[0] > min(self.needed(name)[1], BUDGET)}
        found: dict[str, PairSums | PairRows | None] = {n: PairRows() if n in few else PairSums() for n in names}
        shelf = Shelf()
        for batch in self.batches("comparing layers"):

            def take(name: str, x: Tensor, batch: Any = batch) -> tuple[Any, Tensor]:
                rows = self._rows(x, batch, self.positions(name))
                return x.shape[:2], shelf.take(rows) if name in few else rows

            outputs = [self.outputs(i, names, batch, take) for i in range(2)]
            for name in names:
                x, y = (o.get(name) for o in outputs)
                sums = found[name]
                if sums is None or x is None or y is None or x[0] != y[0]:
                    found[name] = None
                    continue
                sums.add(x[1], y[1])
        return {name: None if sums is None else sums.finish() for name, sums in found.items()}

    def _rows(self, x: Tensor, batch: Any, most: int) -> Tensor:
        """At most so many positions of every example, the same in both models, [rows, neurons]."""
        import torch

        from mergeid.evidence.activations import _positions

        mask = _mask(x, batch)
        rows = []
        for i, example in enumerate(x):
            present = torch.arange(len(example)) if mask is None else torch.nonzero(mask[i].cpu()).reshape(-1)
            rows.append(example[present[_positions(len(present), most, self.run.seed)].to(x.device)].cpu())
        return torch.cat(rows)

    def map(self, names_a: Sequence[str], names_b: Sequence[str]) -> np.ndarray:
        """Unbiased CKA of all layers of A with all layers of B, on activations averaged over positions."""
        from mergeid.evidence.similarity import CkaMap

        found = CkaMap()
        for batch in self.batches("comparing all layers"):

            def take(_: str, x: Tensor, batch: Any = batch) -> Tensor:
                return _averaged(x, batch)

            seen = [(names, self.outputs(i, names, batch, take)) for i, names in enumerate((names_a, names_b))]
            averaged = [[outputs[n] for n in names if n in outputs] for names, outputs in seen]
            if (len(averaged[0]), len(averaged[1])) != (len(names_a), len(names_b)):
                raise MergeidError("the models call different layers from batch to batch; choose some with --layers")
            found.add(*averaged)
        return found.finish()


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _mask(x: Tensor, batch: Any) -> Tensor | None:
    from mergeid.evidence.activations import real_tokens

    mask = real_tokens(batch)
    return mask if mask is not None and mask.shape == x.shape[:2] else None


def _averaged(x: Tensor, batch: Any) -> Tensor:
    """[examples, neurons], the mean over positions that are not padding (which is 0), float64 on the CPU."""
    mask = _mask(x, batch)
    if mask is None:
        return x.double().mean(1).cpu()
    return x.double().sum(1).cpu() / mask.cpu().sum(1, keepdim=True).clamp(min=1)


@contextmanager
def _hooks(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, the outputs of the layers are shown, their neurons in the last dimension."""
    import torch
    from torch.nn.modules.conv import _ConvNd

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() > 1:
                see(name, (output.movedim(1, -1) if isinstance(module, _ConvNd) else output).detach())

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
