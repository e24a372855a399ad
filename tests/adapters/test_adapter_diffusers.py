"""Networks of diffusers: folders, pipelines and single files in other tools' names are aligned and merged."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeid
from mergeid import MergeidError

pytest.importorskip("diffusers")
from mergeid_diffusers.adapter import DiffusersAdapter

UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": [4, 8],
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "latent_channels": 4,
    "norm_num_groups": 2,
}
NETWORKS = {"UNet2DConditionModel": UNET, "FluxTransformer2DModel": FLUX, "AutoencoderKL": VAE}


def _network(kind: str, seed: int) -> Any:
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, kind)(**NETWORKS[kind])
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0, where no permutation would show
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def _saved(folder: Path, kind: str, seed: int) -> Path:
    _network(kind, seed).save_pretrained(folder)
    return folder


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.parent.name}/{k}": t for f in sorted(folder.rglob("*.safetensors")) for k, t in load_file(f).items()}


def _outputs(kind: str, folder: Path) -> torch.Tensor:
    """What diffusers computes with a folder."""
    import diffusers

    model = getattr(diffusers, kind).from_pretrained(folder).eval()
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    with torch.no_grad():
        if kind == "UNet2DConditionModel":
            return model(draw(1, 4, 16, 16), 7, draw(1, 5, 12)).sample
        if kind == "AutoencoderKL":
            return model.encode(draw(1, 3, 16, 16)).latent_dist.parameters
        ids = torch.zeros(16, 3)
        ids[:, 1] = torch.arange(16) // 4
        return model(
            draw(1, 16, 4), draw(1, 5, 32), draw(1, 32), torch.tensor([0.5]), ids, torch.zeros(5, 3), torch.ones(1)
        ).sample


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_scrambled_network_is_planned_and_merged_back(tmp_path: Path, kind: str) -> None:
    """The function stays, most parameters are free, the merge of both is the network itself."""
    a = _saved(tmp_path / "a", kind, 0)
    mergeid.scramble(a, output=tmp_path / "b", seed=1)
    one, two = _state(a), _state(tmp_path / "b")
    moved = sum(t.numel() for k, t in one.items() if not torch.equal(t, two[k.replace("a/", "b/")]))
    assert moved > 0.8 * sum(t.numel() for t in one.values())
    torch.testing.assert_close(_outputs(kind, tmp_path / "b"), _outputs(kind, a), rtol=1e-4, atol=1e-4)
    result = mergeid.merge(a, tmp_path / "b", output=tmp_path / "out")
    assert result.verdict == "match"
    for key, value in load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(value, one[f"a/{key}"], rtol=0, atol=1e-6)
    torch.testing.assert_close(_outputs(kind, tmp_path / "out"), _outputs(kind, a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_network_with_itself_is_itself_bit_for_bit(tmp_path: Path, kind: str) -> None:
    a, b = (_saved(tmp_path / n, kind, 0) for n in "ab")
    mergeid.merge(a, b, output=tmp_path / "out")
    out = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, out[k.removeprefix("a/")]) for k, t in _state(a).items())


def _pipeline(folder: Path, seed: int) -> Path:
    """Of Stable Diffusion's kind."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    StableDiffusionPipeline(
        vae=_network("AutoencoderKL", seed),
        unet=_network("UNet2DConditionModel", seed),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_pipeline_has_every_network_aligned_and_merged(tmp_path: Path) -> None:
    """UNet, autoencoder and text encoder are scrambled each, merged back, and the folder loads as a pipeline."""
    from diffusers import StableDiffusionPipeline

    a = _pipeline(tmp_path / "a", 0)
    mergeid.scramble(a, output=tmp_path / "b", seed=2)
    one, two = _state(a), _state(tmp_path / "b")
    for network in ("unet", "vae", "text_encoder"):
        assert any(not torch.equal(t, two[k]) for k, t in one.items() if k.startswith(f"{network}/"))
    mergeid.merge(a, tmp_path / "b", output=tmp_path / "out")
    out = _state(tmp_path / "out")
    assert out.keys() == one.keys()
    for key, value in out.items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_pipelines_average_every_network(tmp_path: Path) -> None:
    a, b = (_pipeline(tmp_path / n, i) for i, n in enumerate("ab"))
    mergeid.merge(a, b, output=tmp_path / "out", match="never")
    one, two, out = (_state(tmp_path / n) for n in ("a", "b", "out"))
    for key, value in out.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (one[key] + two[key]) / 2, rtol=0, atol=1e-7)


def test_configs_of_a_pipelines_networks_are_compared(tmp_path: Path) -> None:
    a, b = (_pipeline(tmp_path / n, 0) for n in "ab")
    config = b / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "flip_sin_to_cos": False}))
    with pytest.raises(MergeidError, match=r"unet\.flip_sin_to_cos"):
        mergeid.merge(a, b, output=tmp_path / "out", match="never")


def _black_forest(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Flux transformer in the names of its trainers, as ComfyUI reads it: queries, keys and values in one tensor."""

    def swapped(t: torch.Tensor) -> torch.Tensor:
        scale, shift = t.chunk(2, 0)
        return torch.cat([shift, scale], 0)

    out = {}
    for last in ("weight", "bias"):
        s = {k.removesuffix(f".{last}"): t for k, t in state.items() if k.endswith(f".{last}")}
        for old, new in (
            ("timestep_embedder", "time_in"),
            ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        ):
            out[f"{new}.in_layer.{last}"] = s[f"time_text_embed.{old}.linear_1"]
            out[f"{new}.out_layer.{last}"] = s[f"time_text_embed.{old}.linear_2"]
        out[f"txt_in.{last}"], out[f"img_in.{last}"] = s["context_embedder"], s["x_embedder"]
        out[f"final_layer.linear.{last}"] = s["proj_out"]
        out[f"final_layer.adaLN_modulation.1.{last}"] = swapped(s["norm_out.linear"])
        d, b = "double_blocks.0", "transformer_blocks.0"
        out[f"{d}.img_mod.lin.{last}"], out[f"{d}.txt_mod.lin.{last}"] = (
            s[f"{b}.norm1.linear"],
            s[f"{b}.norm1_context.linear"],
        )
        out[f"{d}.img_attn.qkv.{last}"] = torch.cat([s[f"{b}.attn.to_{x}"] for x in "qkv"])
        out[f"{d}.txt_attn.qkv.{last}"] = torch.cat([s[f"{b}.attn.add_{x}_proj"] for x in "qkv"])
        out[f"{d}.img_attn.proj.{last}"], out[f"{d}.txt_attn.proj.{last}"] = (
            s[f"{b}.attn.to_out.0"],
            s[f"{b}.attn.to_add_out"],
        )
        for new, old in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            out[f"{d}.{new}.0.{last}"], out[f"{d}.{new}.2.{last}"] = s[f"{b}.{old}.net.0.proj"], s[f"{b}.{old}.net.2"]
        d, b = "single_blocks.0", "single_transformer_blocks.0"
        out[f"{d}.modulation.lin.{last}"], out[f"{d}.linear2.{last}"] = s[f"{b}.norm.linear"], s[f"{b}.proj_out"]
        out[f"{d}.linear1.{last}"] = torch.cat([*(s[f"{b}.attn.to_{x}"] for x in "qkv"), s[f"{b}.proj_mlp"]])
    for new, old in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        out[f"double_blocks.0.img_attn.norm.{new}.scale"] = state[f"transformer_blocks.0.attn.{old}.weight"]
        out[f"double_blocks.0.txt_attn.norm.{new}.scale"] = state[
            f"transformer_blocks.0.attn.norm_added_{old[-1]}.weight"
        ]
        out[f"single_blocks.0.norm.{new}.scale"] = state[f"single_transformer_blocks.0.attn.{old}.weight"]
    return out


def test_single_file_in_comfyui_names_is_aligned_and_keeps_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways agree: the scrambled file, converted by diffusers, computes what the first does."""
    from diffusers.loaders import single_file_model, single_file_utils

    code = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    scope = dict(vars(single_file_utils))
    exec(code.replace("inner_dim = 3072", "inner_dim = 32"), scope)  # diffusers' own code, at a tiny width
    convert = scope["convert_flux_transformer_checkpoint_to_diffusers"]
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", convert)
    model = _network("FluxTransformer2DModel", 0)
    (tmp_path / "x").mkdir()
    theirs = _black_forest(dict(model.state_dict()))
    save_file({k: t.contiguous() for k, t in theirs.items()}, tmp_path / "x" / "a.safetensors")
    (tmp_path / "x" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **FLUX}))
    mergeid.scramble(tmp_path / "x" / "a.safetensors", output=tmp_path / "x" / "b.safetensors", seed=5)
    scrambled = load_file(tmp_path / "x" / "b.safetensors")
    assert scrambled.keys() == theirs.keys()
    assert not torch.equal(
        scrambled["double_blocks.0.img_attn.qkv.weight"], theirs["double_blocks.0.img_attn.qkv.weight"]
    )
    for name, state in (("one", theirs), ("two", scrambled)):
        again = _network("FluxTransformer2DModel", 1)
        again.load_state_dict(convert(dict(state)))
        again.save_pretrained(tmp_path / name)
    found = [_outputs("FluxTransformer2DModel", tmp_path / n) for n in ("one", "two")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    out = tmp_path / "out.safetensors"
    mergeid.merge(tmp_path / "x" / "a.safetensors", tmp_path / "x" / "b.safetensors", output=out)
    for key, value in load_file(out).items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6)


def test_names_at_hand_are_networks() -> None:
    """Read off files, and never beside a config that says another."""
    import diffusers

    adapter = DiffusersAdapter()
    networks = set(adapter.architectures())
    odd = {"", ".", "unet", "UNet2DConditionModel(", "AutoModel", "../Model", "UNet\n"}
    found = {n for n in {*dir(diffusers), *odd} if adapter.at_hand(n, None)}
    assert found <= networks and len(found) > 0.9 * len(networks) and set(NETWORKS) <= found
    stated = {"_class_name": "AutoencoderKL"}
    assert adapter.at_hand("AutoencoderKL", stated) and not adapter.at_hand("UNet2DModel", stated)


@pytest.mark.parametrize("arch", ["diffusers/AutoencoderKL", "AutoencoderKL"])
def test_a_plain_merge_with_a_name_imports_no_library(tmp_path: Path, arch: str) -> None:
    for seed, name in enumerate("ab"):
        numbers = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        save_file({"w.weight": numbers}, tmp_path / f"{name}.safetensors")
    words = ["mergeid", "merge", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--match", "never"]
    code = (
        f"import sys; sys.argv = {[*words, '--arch', arch]}\n"
        "from mergeid.commands.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code and not {'torch', 'diffusers'} & {*sys.modules}, code"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
