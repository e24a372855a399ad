"""torchaudio's models for the coverage table, small: all that are exported and return tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_live import Draw, bench_of
from torch import Tensor, nn

Maker = Callable[[], tuple[nn.Module, Draw]]


def _lengths(n: int, longest: int) -> Tensor:
    """Different ones, the longest first."""
    return torch.tensor([max(longest - 2 * i, 1) for i in range(n)])


def _conformer(group_norm: bool, first: bool) -> tuple[nn.Module, Draw]:
    from torchaudio.models import Conformer

    model = Conformer(12, 3, 24, 2, 5, use_group_norm=group_norm, convolution_first=first)
    return model, lambda g, n: {"input": torch.randn(n, 11, 12, generator=g), "lengths": _lengths(n, 11)}


def _conv_tasnet() -> tuple[nn.Module, Draw]:
    from torchaudio.models import ConvTasNet

    model = ConvTasNet(2, 8, 16, 3, 8, 16, 2, 2, "sigmoid")
    return model, lambda g, n: {"input": torch.randn(n, 1, 64, generator=g)}


def _deepspeech() -> tuple[nn.Module, Draw]:
    from torchaudio.models import DeepSpeech

    return DeepSpeech(10, 16, 7), lambda g, n: {"x": torch.randn(n, 1, 9, 10, generator=g)}


def _emformer() -> tuple[nn.Module, Draw]:
    from torchaudio.models import Emformer

    model = Emformer(16, 2, 24, 2, 4, left_context_length=4, right_context_length=1)
    return model, lambda g, n: {"input": torch.randn(n, 9, 16, generator=g), "lengths": _lengths(n, 8)}


def _emformer_memory() -> tuple[nn.Module, Draw]:
    from torchaudio.models import Emformer

    model = Emformer(16, 2, 24, 2, 4, left_context_length=4, right_context_length=1, max_memory_size=2)
    return model, lambda g, n: {"input": torch.randn(n, 9, 16, generator=g), "lengths": _lengths(n, 8)}


def _tacotron2() -> tuple[nn.Module, Draw]:
    from torchaudio.models import Tacotron2

    model = Tacotron2(
        n_mels=6,
        n_symbol=12,
        symbol_embedding_dim=12,
        encoder_embedding_dim=12,
        encoder_n_convolution=2,
        attention_rnn_dim=14,
        attention_hidden_dim=10,
        attention_location_n_filter=4,
        decoder_rnn_dim=16,
        prenet_dim=8,
        postnet_n_convolution=3,
        postnet_embedding_dim=10,
    )

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        return {
            "tokens": torch.randint(0, 12, (n, 7), generator=g),
            "token_lengths": _lengths(n, 7),
            "mel_specgram": torch.randn(n, 6, 9, generator=g),
            "mel_specgram_lengths": _lengths(n, 9),
        }

    return model, draw


def _wav2letter(kind: str) -> tuple[nn.Module, Draw]:
    from torchaudio.models import Wav2Letter

    width, length = (1, 2000) if kind == "waveform" else (10, 60)
    model = Wav2Letter(num_classes=5, input_type=kind, num_features=width)
    return model, lambda g, n: {"x": torch.randn(n, width, length, generator=g)}


CONVOLUTIONS = [(16, 10, 5), (16, 3, 2)]


def _encoder_options() -> dict[str, object]:
    return {
        "extractor_conv_layer_config": CONVOLUTIONS, "extractor_conv_bias": False, "encoder_embed_dim": 24,
        "encoder_projection_dropout": 0.0, "encoder_num_layers": 2, "encoder_num_heads": 3,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 32, "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0, "encoder_layer_drop": 0.0,
    }  # fmt: skip


def _waves(g: torch.Generator, n: int) -> dict[str, Tensor]:
    return {"waveforms": torch.randn(n, 400, generator=g), "lengths": _lengths(n, 400)}


def _wav2vec2(mode: str, first: bool, heads: int | None) -> tuple[nn.Module, Draw]:
    from torchaudio.models import wav2vec2_model

    model = wav2vec2_model(
        extractor_mode=mode,
        encoder_layer_norm_first=first,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=4,
        aux_num_out=heads,
        **_encoder_options(),
    )
    return model, _waves


def _wavlm() -> tuple[nn.Module, Draw]:
    from torchaudio.models import wavlm_model

    options = _encoder_options()
    model = wavlm_model(
        extractor_mode="group_norm",
        encoder_layer_norm_first=False,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=4,
        encoder_num_buckets=8,
        encoder_max_distance=16,
        aux_num_out=5,
        **options,
    )
    return model, lambda g, n: {"waveforms": torch.randn(n, 400, generator=g)}


class _Pretraining(nn.Module):
    """Its targets are an input, so they go by another name than those of a task."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor, targets: Tensor) -> Any:
        return self.model(waveforms, targets)


def _hubert_pretrain() -> tuple[nn.Module, Draw]:
    from torchaudio.models import hubert_pretrain_model

    model = hubert_pretrain_model(
        extractor_mode="group_norm",
        encoder_layer_norm_first=False,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=4,
        mask_prob=0.4,
        mask_selection="static",
        mask_other=0.0,
        mask_length=2,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=2,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=False,
        num_classes=6,
        final_dim=8,
        feature_grad_mult=None,
        **_encoder_options(),
    )

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        frames = 39
        return {"waveforms": torch.randn(n, 400, generator=g), "targets": torch.randint(0, 6, (n, frames), generator=g)}

    return _Pretraining(model), draw


def _wavernn() -> tuple[nn.Module, Draw]:
    from torchaudio.models import WaveRNN

    model = WaveRNN(
        [2, 2, 3], 6, 12, n_res_block=2, n_rnn=16, n_fc=14, kernel_size=5, n_freq=8, n_hidden=10, n_output=8
    )

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        frames = 9
        return {
            "waveform": torch.randn(n, 1, (frames - 4) * 12, generator=g),
            "specgram": torch.randn(n, 1, 8, frames, generator=g),
        }

    return model, draw


def _rnnt() -> tuple[nn.Module, Draw]:
    from torchaudio.models.rnnt import emformer_rnnt_model

    model = emformer_rnnt_model(
        input_dim=8,
        encoding_dim=12,
        num_symbols=9,
        segment_length=8,
        right_context_length=4,
        time_reduction_input_dim=6,
        time_reduction_stride=4,
        transformer_num_heads=2,
        transformer_ffn_dim=16,
        transformer_num_layers=2,
        transformer_dropout=0.0,
        transformer_activation="gelu",
        transformer_left_context_length=4,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=10,
        num_lstm_layers=2,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.0,
    )

    def draw(g: torch.Generator, n: int) -> dict[str, Tensor]:
        return {
            "sources": torch.randn(n, 20, 8, generator=g),
            "source_lengths": torch.tensor([16, 12, 12, 12][:n]).int(),
            "targets": torch.randint(0, 9, (n, 5), generator=g).int(),
            "target_lengths": _lengths(n, 5).int(),
        }

    return model, draw


def _hdemucs(channels: int, depth: int, lstm: bool) -> tuple[nn.Module, Draw]:
    from torchaudio.models import HDemucs

    model = HDemucs(["drums", "vocals"], audio_channels=2, channels=channels, nfft=256, depth=depth)
    return model, lambda g, n: {"input": torch.randn(n, 2, 3000, generator=g)}


def _squim_objective() -> tuple[nn.Module, Draw]:
    from torchaudio.models import squim_objective_model

    model = squim_objective_model(
        feat_dim=16, win_len=16, d_model=12, nhead=2, hidden_dim=14, num_blocks=2, rnn_type="LSTM", chunk_size=5
    )
    return model, lambda g, n: {"x": torch.randn(n, 400, generator=g)}


def _squim_subjective() -> tuple[nn.Module, Draw]:
    from torchaudio.models import squim_subjective_model

    model = squim_subjective_model(ssl_type="wav2vec2_base", feat_dim=768, proj_dim=8, att_dim=5)
    model.ssl_model, _ = _wav2vec2("group_norm", False, None)
    model.projector = nn.Linear(24, 8)
    return model, lambda g, n: {
        "waveform": torch.randn(n, 400, generator=g),
        "reference": torch.randn(n, 400, generator=g),
    }


MODELS: dict[str, Maker] = {
    "Conformer": lambda: _conformer(False, False),
    "Conformer/group_norm": lambda: _conformer(True, False),
    "Conformer/convolution_first": lambda: _conformer(False, True),
    "ConvTasNet": _conv_tasnet,
    "DeepSpeech": _deepspeech,
    "Emformer": _emformer,
    "Emformer/memory": _emformer_memory,
    "HDemucs": lambda: _hdemucs(4, 3, False),
    "HDemucs/lstm": lambda: _hdemucs(4, 5, True),
    "HuBERTPretrainModel": _hubert_pretrain,
    "RNNT": _rnnt,
    "SquimObjective": _squim_objective,
    "SquimSubjective": _squim_subjective,
    "Tacotron2": _tacotron2,
    "Wav2Letter/mfcc": lambda: _wav2letter("mfcc"),
    "Wav2Letter/waveform": lambda: _wav2letter("waveform"),
    "Wav2Vec2Model": lambda: _wav2vec2("group_norm", False, None),
    "Wav2Vec2Model/layer_norm": lambda: _wav2vec2("layer_norm", True, 5),
    "Wav2Vec2Model/wavlm": _wavlm,
    "WaveRNN": _wavernn,
}


names, families, make = bench_of(MODELS, "torchaudio.models")
