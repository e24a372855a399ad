"""Writes identify_reference.npz: supports and costs of one small masked layer, from the paper's formulas in NumPy.

    python tests/data/make_identify_reference.py

Independent of mergeid. The masks are chosen so that every S_i has rank k: there the paper's public code, which leaves
the residual out, computes the same.
"""

from itertools import permutations
from pathlib import Path

import numpy as np


def main() -> None:
    rng = np.random.default_rng(20260604)
    rows, d, m = 160, 10, 5
    x = (rng.standard_normal((rows, d)) * np.linspace(3, 0.3, d) @ rng.standard_normal((d, d)) + 0.7).astype(np.float32)
    fixed, weights = rng.standard_normal((m, d)), rng.standard_normal((m, d))
    mask = (rng.random((m, d)) < 0.8).astype(np.float64)
    tau = 0.9
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    singular, right = np.linalg.svd(centred, full_matrices=False)[1:]
    share = np.cumsum(singular**2) / np.sum(singular**2)
    k = int(np.searchsorted(share, tau)) + 1
    u = right[:k].T
    effective = (1 - mask) * fixed + mask * weights
    f = (1 - mask) * fixed
    gram = np.stack([u.T @ np.diag(row**2) @ u for row in mask])
    assert all(np.linalg.matrix_rank(s) == k for s in gram)
    cost = np.empty((m, m))
    for i in range(m):
        for j in range(m):
            b = u.T @ effective[j] - u.T @ f[i]
            cost[i, j] = b @ np.linalg.inv(gram[i]) @ b
    swap = cost + cost.T - np.diag(cost)[:, None] - np.diag(cost)[None]
    totals = [sum(cost[i, p[i]] for i in range(m)) for p in permutations(range(m))]
    np.savez(
        Path(__file__).with_name("identify_reference.npz"),
        x=x,
        fixed=f,
        mask=mask,
        effective=effective,
        tau=tau,
        k=k,
        projection=u @ u.T,
        explained=share[k - 1],
        coherence=(u**2).sum(1).max(),
        eigengap=(singular[k - 1] ** 2 - singular[k] ** 2) / rows,
        cost=cost,
        swap=swap,
        identity=np.trace(cost),
        optimal=min(totals),
        random=np.mean(totals),
    )


if __name__ == "__main__":
    main()
