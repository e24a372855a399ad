"""Peak memory of the costs and the exact margin of one wide layer: `python tests/bench/function_class_memory.py`.

Defaults: 14,336 neurons of 4,096 inputs (an MLP of a Llama of 8 billion parameters), support of 1,024 dimensions. The
inputs are sketched as the engine does it; the fixed part is the weights before a small update.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.margin import margin
from mergeid.evidence.separation import gamma_out
from mergeid.evidence.support import InputMoments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8192)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments(options.inputs, sketch=2 * options.k, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(1, 0.1, options.inputs)
    for start in range(0, options.rows, 1024):
        rows = min(1024, options.rows - start)
        moments.add(torch.randn(rows, options.inputs, generator=generator) * scales)
    began = time.perf_counter()
    support = moments.support().with_k(options.k)
    report("support", began)
    del moments
    fixed = torch.randn(options.neurons, options.inputs, generator=generator) / options.inputs**0.5
    weights = fixed + 0.1 * torch.randn(options.neurons, options.inputs, generator=generator) / options.inputs**0.5
    classes = FunctionClasses(fixed, (support,))
    began = time.perf_counter()
    cost = classes.costs(weights)
    report("costs", began)
    began = time.perf_counter()
    found = margin(cost)
    report("margin", began)
    began = time.perf_counter()
    gamma = gamma_out(classes)
    report("gamma_out", began)
    print(
        f"margin {found.value:.6g} (identity optimal: {found.identity_optimal}), cheapest swap {found.least_swap:.6g}, "
        f"gamma_out {gamma:.4g}"
    )


def report(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - began:.1f} s, peak so far {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
