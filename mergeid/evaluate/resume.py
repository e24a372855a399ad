"""Points of a barrier curve kept on disk, so that an interrupted measurement goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mergeid.basics.reading import read_json
from mergeid.errors import MergeidError, reason
from mergeid.evaluate.measure import Metrics
from mergeid.io.publish import write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = "mergeid.barrier-points/1"
SAMPLED_EXAMPLES = 64


class PointFile:
    """Finished points of one curve in a JSON file: ``{"format", "curves": {digest: {λ: metrics}}}``.

    A file holds any number of curves, each under the digest of all that it depends on, so that points of other
    inputs are never taken for this one's. Only the main process reads and writes.
    """

    def __init__(self, path: Path, digest: str, accelerator: Accelerator) -> None:
        self.path, self.digest, self.accelerator = Path(os.path.expanduser(path)), digest, accelerator
        self._curves: dict[str, dict[str, Any]] = {}

    def load(self) -> dict[float, Metrics]:
        """Points measured before, the same on all processes. Raises `MergeidError` if the file is something else."""
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                self._curves = self._read()
                found = [self._curves.get(self.digest, {})]
            except MergeidError as error:
                found = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], MergeidError):
            raise found[0]
        return {float(x): Metrics(**point) for x, point in found[0].items()}

    def add(self, x: float, metrics: Metrics) -> None:
        """Appends a point; the file is replaced as a whole, never seen half written."""
        if not self.accelerator.is_main_process:
            return
        point = {"loss": metrics.loss, "accuracy": metrics.accuracy, "count": metrics.count}
        self._curves.setdefault(self.digest, {})[repr(x)] = point
        write_whole(self.path, json.dumps({"format": FORMAT, "curves": self._curves}, indent=1) + "\n", "--resume")

    def _read(self) -> dict[str, dict[str, Any]]:
        from mergeid.io.schema import PointsFile, validated

        try:
            os.lstat(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise MergeidError(f"{self.path} cannot be a file of barrier points: {reason(error)}") from None
        wanted = "a file that an earlier barrier run wrote, so choose another one or delete it"
        try:
            content = read_json(self.path, wanted)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise MergeidError("another format")
        except MergeidError as error:
            raise MergeidError(f"{self.path} contains no barrier points ({error}); expected {wanted}") from None
        found = validated(PointsFile, content, str(self.path))
        return {digest: {repr(x): p.model_dump() for x, p in curve.items()} for digest, curve in found.curves.items()}


def digest_of(states: Sequence[Mapping[str, Any]], datasets: Sequence[Any], settings: Mapping[str, Any]) -> str:
    """SHA-256 over all tensors of the states, 64 evenly spaced examples of each data set and its length, and the
    settings (JSON)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for state in states:
        for name in sorted(state):
            digest.update(name.encode())
            _feed(digest, state[name])
    for dataset in datasets:
        count = 0 if dataset is None else len(dataset)
        digest.update(f"data {count}".encode())
        for index in sorted({k * count // SAMPLED_EXAMPLES for k in range(SAMPLED_EXAMPLES if count else 0)}):
            _feed(digest, dataset[index])
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif (array := _numbers(value)) is not None:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        if array.dtype.hasobject:
            _feed(digest, array.ravel().tolist())
        else:
            digest.update(array.tobytes())
        if callable(palette := getattr(value, "getpalette", None)):  # an image whose array holds places in it
            digest.update(repr(palette()).encode())
    else:
        digest.update(repr(value).encode())


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    """What is an array, or makes itself one (an image, say): its text would be shortened, or hold an address."""
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        return None
    return np.asarray(value)
