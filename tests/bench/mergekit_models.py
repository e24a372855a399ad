"""The small models that `mergekit_parity` merges: random weights from seeds."""

from __future__ import annotations

import atexit
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from mergekit_recipes import THREE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = {
    "base-t": ([f"w{i}" for i in range(70)], ["<both>"]),
    "a-t": ([f"w{i}" for i in range(60)] + ["left"], ["<x>", "<both>"]),
    "b-t": (
        ["w0", "right"] + [f"w{i}" for i in range(69, 20, -1)] + [f"w{i}" for i in range(70, 90)],
        ["<both>", "<y>"],
    ),
}
"""Models with tokens of their own: those of the tokenizer, and added ones. Rows beyond them are padding."""
OWN_TEMPLATES = {"a-t": "{{ messages[0].content }} a", "b-t": "{{ messages[0].content }} a\n"}
CONVERSATIONS = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("user", "Hello")],
        [("system", "Be brief."), ("user", " Hello \n")],
        [("system", " Be brief.\n"), ("user", "Hello"), ("assistant", "  Good day."), ("user", "How are\nyou? ")],
        [("user", "One"), ("assistant", "two "), ("user", "three"), ("assistant", "four\n")],
        [("system", "First"), ("user", "x"), ("assistant", "y"), ("system", "Second"), ("user", "")],
        [("user_context", "A text"), ("user", "Shorten it")],
        [("assistant", "I begin"), ("user", "Then I go on")],
        [("user", "two"), ("user", "in a row")],
        [("tool", "{}"), ("user", "Now?")],
    )
]
"""What both tools' templates are asked to render, with the answer to come and without."""
ROWS = {"base-t": 80, "a-t": 63, "b-t": 73}


def make_models(folder: Path) -> None:
    """base, a, b, c: fine-tunes that differ from it by noise of several sizes."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    for seed, name in enumerate(("base", *THREE)):
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        for parameter in model.parameters():
            parameter.data += 0.02 * seed * torch.randn_like(parameter)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model.to(dtype).save_pretrained(folder / str(dtype).removeprefix("torch.") / name)
    make_adapter(folder / "float32")
    place_in_cache(folder / "float32" / "c")
    for seed, (name, (words, added)) in enumerate(WORDS.items()):
        torch.manual_seed(10 + seed)
        config.vocab_size = ROWS[name]
        place = folder / "float32" / name
        LlamaForCausalLM(config).save_pretrained(place)
        core = Tokenizer(WordLevel({t: i for i, t in enumerate(words)}, unk_token="w0"))
        core.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", bos_token="w30", eos_token="w31")
        tokenizer.add_special_tokens({"additional_special_tokens": added})
        tokenizer.chat_template = OWN_TEMPLATES.get(name)
        tokenizer.save_pretrained(place)


def make_adapter(folder: Path) -> None:
    """A LoRA of rank 2 on a, with noise in both factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(20)
    targets = ["q_proj", "down_proj"]
    told = LoraConfig(r=2, lora_alpha=6, target_modules=targets, base_model_name_or_path=str(folder / "a"))
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "a"), told)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "a-lora")


def place_in_cache(model: Path) -> None:
    """As if ``tiny/hub@v1`` had been downloaded."""
    from huggingface_hub import constants

    repo = Path(constants.HF_HUB_CACHE) / "models--tiny--hub"
    commit = "0123456789abcdef0123456789abcdef01234567"
    atexit.register(shutil.rmtree, constants.HF_HUB_CACHE, ignore_errors=True)
    shutil.copytree(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)


def make_models_of_parts(folder: Path) -> None:
    """base, a, b of kinds with encoder and decoder, or with eyes."""
    import transformers as tr

    text: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    seeing = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    pixels = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "head_dim": 8,
    }  # fmt: skip
    made: dict[str, tuple[Any, Any]] = {
        "t5": (
            tr.T5ForConditionalGeneration,
            tr.T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
                tie_word_embeddings=False, feed_forward_proj="gated-gelu",
            ),
        ),
        "whisper": (
            tr.WhisperForConditionalGeneration,
            tr.WhisperConfig(
                vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            ),
        ),
        "qwen2_vl": (
            tr.Qwen2VLForConditionalGeneration,
            tr.Qwen2VLConfig(text_config={**text, **rope}, vision_config=seeing),
        ),
        "mistral3": (
            tr.Mistral3ForConditionalGeneration,
            tr.Mistral3Config(
                text_config={**text, "head_dim": 8, "model_type": "mistral"},
                vision_config={**pixels, "model_type": "pixtral"},
            ),
        ),
    }  # fmt: skip
    for kind, (network, config) in made.items():
        torch.manual_seed(0)
        model = network(config)
        for name in ("base", "a", "b"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            model.save_pretrained(folder / "float32" / kind / name)
