"""Estimate: memory, disk and time of a merge, from the headers of its files alone.

The constants were measured with `tests/bench/merge_sizes.py` and `tests/bench/any_size.py` on one core of a server; a
time is right within a factor of about two elsewhere.
"""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

from mergeid.io.dtypes import BITS
from mergeid.io.tensors import TensorSource
from mergeid.models.mapped import LARGEST_HELD
from mergeid.results.estimate import Cost, Estimate
from mergeid.stages.open import Met

MIB = 1 << 20
PLAIN, WITH_TORCH, WITH_MODEL = 60 * MIB, 300 * MIB, 460 * MIB
"""Memory of a process that sums in NumPy, that has torch, and that has built a model without values."""
HELD = 24
"""Bytes per parameter where models are held."""
KEPT = 256 * MIB
"""Weights that are kept after they were read."""
SQUARES = 4
"""float32 matrices over pairs of neurons that matching holds at once where it multiplies all of them."""
PLAINLY, PIECES = 0.25e-6, 24
"""Seconds per parameter, and bytes per number of the largest matrix, where every neuron's partner is plain to see
(`mergeid.matchers.plain`)."""
HASHED, SUMMED, LOOKED, WRITTEN = 0.85, 1.0, 0.9, 0.6
"""Seconds per GB: of hashing what is read, of adding it up, of comparing rows in place, and of writing."""
PRODUCTS = 60e9
"""Multiplications and additions in a second."""
PASSES = 4
"""Products that matching takes, of each matrix along each of its axes with that of the other model."""


def estimate_merge(met: Met, beside: Path) -> Estimate:
    """What a merge of these models takes.

    Args:
        beside: a folder on the disk that the output goes to.
    """
    models = met.everyone
    first = models[0]
    sizes = tuple(map(_bytes, models))
    read, out = sum(sizes), sizes[0]
    stream = (read * (HASHED + SUMMED) + out * WRITTEN) / 1e9
    rows = read * LOOKED / 1e9
    shapes = [first.table[n].shape for n in met.float_names]
    parameters = sum(map(prod, shapes))
    widest = _widest(first, shapes)
    square = 4 * widest * widest
    if parameters <= LARGEST_HELD:
        memory = seen = WITH_MODEL + HELD * parameters
    else:
        largest = max((prod(s) for s in shapes if max(s, default=0) <= widest), default=0)
        memory = WITH_MODEL + KEPT + SQUARES * square + 8 * largest
        seen = min(memory, WITH_MODEL + KEPT + PIECES * largest)
    products = 2 * PASSES * sum(prod(s) * d for s in shapes if len(s) > 1 for d in s if d <= widest) / PRODUCTS
    opened, others = 15 + stream + rows, len(models) - 1
    plainly = min(PLAINLY * parameters, products)
    costs = (
        Cost("as they are", PLAIN, out, read, 1 + stream, "--match never, linear; other methods take torch's 300 MiB"),
        Cost("fine-tunes", PLAIN, out, 2 * read, 1 + stream + rows, "by default, if all rows are in place"),
        Cost("permuted copies", seen, out, 3 * read, opened + plainly * others, "where every partner is plain to see"),
        Cost("independent", memory, out, 3 * read, opened + products * others, "by default elsewhere; without data"),
    )
    return Estimate(parameters, sizes, shutil.disk_usage(beside).free, costs)


def _bytes(checkpoint: TensorSource) -> int:
    return sum(prod(i.shape) * BITS.get(i.dtype, 8) for i in checkpoint.table.values()) // 8


def _widest(first: TensorSource, shapes: list[tuple[int, ...]]) -> int:
    """The largest axis on which neurons can lie: one of a matrix that is no vocabulary, which two tensors have at most
    and others never."""
    counts: dict[int, int] = {}
    for shape in shapes:
        for size in set(shape) if len(shape) > 1 else ():
            counts[size] = counts.get(size, 0) + 1
    vocabulary = (first.config or {}).get("vocab_size")
    common = [size for size, count in counts.items() if count > 2 and size != vocabulary]
    return max(common or [s for s in counts if s != vocabulary] or [1])
