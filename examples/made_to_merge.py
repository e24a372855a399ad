"""Networks made to merge: an MLP, a ResNet, a ViT and a Llama, two each from independent seeds, averaged as they are.

    python examples/made_to_merge.py                 # about a quarter of an hour on one core; --only mlp: a minute
    python examples/made_to_merge.py --only mlp --sigma 0.3 --sigma 0.1     # fixed parts of other strengths besides

Each is trained as an ordinary network; with fixed parts everywhere but in the head, as `mergeid.nn.asymmetrise` gives
them by default; with fixed parts in its inner layers only, so that nothing holds what reads the inputs; and with fixed
parts that are too weak. What mergeid decides without any data stands beside what the midpoint of the two loses. Images
are Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist), text is Python's own standard library, byte by byte.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import mergeid
from mergeid.nn import asymmetrise
from mergeid.repair.batchnorm import reestimate_batchnorm

FASHION = Path("/usr/share/datasets/fashion-mnist")
FIXED_SEED = 9
"""Of the fixed parts; the trainable weights and the order of the examples come from seeds 0 and 1."""


@dataclass(frozen=True)
class Task:
    """Training and test examples, and what a batch of outputs loses."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Network:
    """How a network is made and trained.

    Attributes:
        inner: names of the layers that get fixed parts where those that read the inputs do not.
    """

    make: Callable[[], nn.Module]
    task: Callable[[], Task]
    epochs: int
    rate: float
    inner: tuple[str, ...]
    batch: int = 64


@dataclass(frozen=True)
class Row:
    """One pair: losses in nats, accuracies as shares; `lost` by the midpoint against the mean of both networks;
    `angle`: the widest to the fixed parts over all spaces, in degrees."""

    network: str
    variant: str
    loss_a: float
    loss_b: float
    accuracy: float
    loss_midpoint: float
    accuracy_midpoint: float
    lost: float
    angle: float | None
    identified: int
    spaces: int
    judged_by: str
    verdict: str


# -- data and networks --------------------------------------------------------------------------------------


def images(count: int, flat: bool = False, pad: int = 0) -> Task:
    """Fashion-MNIST, the first `count` for training and 2,000 test images, standardised."""
    if not FASHION.is_dir():
        sys.exit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")

    def read(split: str, stop: int) -> tuple[Tensor, Tensor]:
        raw = [
            gzip.decompress((FASHION / f"{split}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        ]
        pixels = torch.from_numpy(np.frombuffer(raw[0], np.uint8, offset=16).copy()).reshape(-1, 1, 28, 28)[:stop]
        x = F.pad((pixels.float() / 255 - 0.2860) / 0.3530, (pad,) * 4)
        return x.flatten(1) if flat else x, torch.from_numpy(np.frombuffer(raw[1], np.uint8, offset=8).copy())[
            :stop
        ].long()

    return Task(*read("train", count), *read("t10k", 2000))


def text(count: int, length: int = 48) -> Task:
    """`count` windows of Python's standard library for training and 500 for testing, from other files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))

    def windows(chosen: list[Path], number: int) -> Tensor:
        data = np.frombuffer(b"".join(f.read_bytes() for f in chosen), np.uint8)
        at = np.linspace(0, len(data) - length - 1, number).astype(np.int64)
        return torch.from_numpy(np.stack([data[i : i + length] for i in at])).long()

    train, test = windows(files[::2], count), windows(files[1::2], 500)
    return Task(train, train, test, test)


def mlp() -> nn.Module:
    wide = [m for n in (784, 256) for m in (nn.Linear(n, 256), nn.LayerNorm(256), nn.GELU())]
    return nn.Sequential(*wide, nn.Linear(256, 10))


def vit() -> nn.Module:
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**size, embed_dim=64, depth=3, num_heads=2, mlp_ratio=2)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", in_chans=1, num_classes=10)


def llama() -> nn.Module:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=256, tie_word_embeddings=False))


NETWORKS = {
    "mlp": Network(mlp, lambda: images(6000, flat=True), 6, 3e-3, ("3",)),
    "resnet": Network(resnet, lambda: images(4000, pad=2), 4, 3e-3, ("layer*",)),
    "vit": Network(vit, lambda: images(4000), 8, 2e-3, ("blocks.*",)),
    "llama": Network(llama, lambda: text(5000), 4, 3e-3, ("model.layers.*",)),
}
# name -> standard deviation of the fixed values, None for none, and whether inner layers alone have them
VARIANTS: dict[str, tuple[float | None, bool]] = {
    "ordinary": (None, False),
    "anchored": (1.0, False),
    "inner layers only": (1.0, True),
    "anchored, σ = 0.01": (0.01, False),
}


# -- training and measuring ---------------------------------------------------------------------------------


def scored(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every prediction, and whether it is right: classes of images, or the next byte."""
    out = model(x)
    if not isinstance(out, Tensor):
        out, labels = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(out, labels, reduction="none"), out.argmax(-1) == labels


def train(network: Network, task: Task, seed: int, sigma: float | None = None, inner: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = network.make()
    if sigma is not None:
        generator = torch.Generator().manual_seed(FIXED_SEED)
        asymmetrise(model, "w", sigma=sigma, generator=generator, layers=network.inner if inner else None)
    steps = network.epochs * (len(task.x) // network.batch)
    optimiser = torch.optim.AdamW(model.parameters(), network.rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, 10 * (s + 1) / steps) * (1 + cos(pi * s / steps)) / 2
    )
    model.train()
    for _ in range(network.epochs):
        order = torch.randperm(len(task.x))
        for batch in order[: len(order) // network.batch * network.batch].split(network.batch):
            loss = scored(model, task.x[batch], task.labels[batch])[0].mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, task: Task) -> tuple[float, float]:
    """Test loss in nats, and accuracy."""
    parts = [scored(model, x, y) for x, y in zip(task.test_x.split(250), task.test_labels.split(250), strict=True)]
    loss, right = (torch.cat([p[k] for p in parts]).double().mean() for k in (0, 1))
    return float(loss), float(right)


def midpoint(a: nn.Module, b: nn.Module, task: Task) -> nn.Module:
    """The average of all weights as they lie; BatchNorm statistics are estimated again on 512 training images."""
    middle = copy.deepcopy(a)
    other = b.state_dict()
    state = {k: (v + other[k]) / 2 if v.is_floating_point() else v for k, v in a.state_dict().items()}
    middle.load_state_dict(state)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in middle.modules()):
        reestimate_batchnorm(middle, [{"x": task.x[:512]}], forward=lambda m, batch: m(batch["x"]))
    return middle.eval()


def measured(name: str, variant: str, sigma: float | None, inner: bool) -> Row:
    network = NETWORKS[name]
    task = network.task()
    a, b = (train(network, task, seed, sigma, inner) for seed in (0, 1))
    (loss_a, right_a), (loss_b, right_b) = (measure(m, task) for m in (a, b))
    loss, right = measure(midpoint(a, b, task), task)
    # decided without data: what the weights, or the fixed parts, say
    plan = mergeid.plan(a, b, example_inputs=None if name == "llama" else task.x[:2])
    known = [s.certificate for s in plan.spaces if s.certificate is not None]
    angles = [x for c in known for x in (c.angle_a, c.angle_b) if x is not None]
    return Row(
        name,
        variant,
        loss_a,
        loss_b,
        (right_a + right_b) / 2,
        loss,
        right,
        loss - (loss_a + loss_b) / 2,
        max(angles, default=None),
        sum(c.says == "identified" for c in known),
        len(plan.spaces),
        plan.evidence,
        plan.verdict,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What averaging networks that were made to merge loses.")
    parser.add_argument("--only", choices=list(NETWORKS), action="append", help="a network; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument(
        "--sigma", type=float, action="append", default=[], help="a further strength of the fixed parts"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    variants = VARIANTS | {f"anchored, σ = {s:g}": (s, False) for s in arguments.sigma}
    rows = []
    print("network  variant                 ends (nats)   acc.   midpoint   acc.    lost  angle  identified  judged by")
    for name in arguments.only or NETWORKS:
        for variant, (sigma, inner) in variants.items():
            row = measured(name, variant, sigma, inner)
            rows.append(row)
            angle = "–" if row.angle is None else f"{row.angle:.0f}°"
            ends = f"{row.loss_a:.3f} {row.loss_b:.3f}  {row.accuracy:6.1%}"
            middle = f"{row.loss_midpoint:6.3f}  {row.accuracy_midpoint:6.1%}  {row.lost:6.3f}"
            said = f"{angle:>5}  {row.identified:2} of {row.spaces:2}    {row.judged_by}"
            print(f"{name:8} {variant:22}  {ends}  {middle}  {said}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
