"""Converting whole models: which layers, what stays the same, and the way back to the ordinary architecture."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from tiny_transformers import configs
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mergeid import MergeidError
from mergeid import nn as mnn
from mergeid.nn.layers import bare_tables, neuron_axes
from mergeid.plugins import get_adapter

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vision(name: str, **options):
    return lambda: timm.create_model(name, num_classes=5, **options)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=seeded(1))


TOKENS = torch.arange(12).reshape(2, 6)
# name -> (maker, input, head; one that is tied to the embedding is converted with it)
MODELS = {
    "resnet": (vision("resnet10t", zero_init_last=False), images(48), "fc"),
    "convnext": (
        vision("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), ls_init_value=0.5),
        images(64),
        "head.fc",
    ),
    "vit": (vision("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2), images(32), "head"),
    "beit": (vision("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2), images(32), "head"),
    "nfnet": (vision("nf_resnet26"), images(48), "head.fc"),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), TOKENS, "classifier"),
    "bert-mlm": (lambda: BertForMaskedLM(BertConfig(**SMALL)), TOKENS, "cls.predictions.decoder"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), TOKENS, "lm_head"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)), TOKENS, "lm_head"),
    "mha": (encoder, torch.randn(2, 5, 16, generator=seeded(1)), "1"),
}


@pytest.fixture(params=MODELS)
def model_and_input(request):
    make, x, head = MODELS[request.param]
    torch.manual_seed(0)
    return make().eval(), make, x, head


def run(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.logits if hasattr(out, "logits") else out


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_fold_is_the_same_function_in_the_ordinary_architecture(model_and_input, kind):
    model, make, x, head = model_and_input
    names = list(model.state_dict())
    done = mnn.asymmetrise(model, kind, generator=seeded())
    found = run(model, x)
    folded = mnn.fold(model)
    assert list(folded) == names
    plain = make().eval()
    plain.load_state_dict(folded)
    torch.testing.assert_close(run(plain, x), found)
    again = mnn.fold_state(folded)
    assert again.keys() == folded.keys() and all(torch.equal(again[k], folded[k]) for k in folded)
    # the head and what has no neurons are left alone, nothing else is
    every = {n for n, m in model.named_modules() if neuron_axes(m)}
    tables = {f"{n}.{k}".lstrip(".") for n, m in model.named_modules() for k in bare_tables(m)}
    assert set(done.converted) | set(done.skipped) == every | tables
    tied = head in ("cls.predictions.decoder", "lm_head") and getattr(model.config, "tie_word_embeddings", False)
    assert done.skipped == ({} if tied else {head: "task head"})
    fixed = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, mnn.Asymmetric) for k in m.fixed_names}
    assert {n.lstrip(".").removesuffix("_weight") for n in fixed if "bias" not in n} == {
        n if n in tables else f"{n}.in_proj" if n.endswith("self_attn") else f"{n}.weight" for n in done.converted
    }


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_a_converted_model_trains_and_survives_copies(model_and_input, kind):
    model, _, x, _ = model_and_input
    mnn.asymmetrise(model, kind, generator=seeded())
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(other, x), expected)
    fixed = {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("_fixed", "_mask"))}
    steps = torch.optim.AdamW(mnn.decay_groups(model, 0.1), lr=1e-2)
    before = mnn.fold(copy.deepcopy(model))
    run(model, x).square().mean().backward()
    steps.step()
    after = model.state_dict()
    assert fixed and all(torch.equal(after[k], v) for k, v in fixed.items())
    moved = [k for k, v in mnn.fold(model).items() if not torch.equal(v, before[k])]
    assert len(moved) > len(fixed) / 4
    assert run(copy.deepcopy(model).bfloat16(), x.bfloat16() if x.is_floating_point() else x).dtype == torch.bfloat16


def test_fold_module_gives_back_the_ordinary_classes(model_and_input):
    model, make, x, _ = model_and_input
    types = [type(m) for m in model.modules()]
    mnn.asymmetrise(model, "w", generator=seeded())
    expected = run(model, x)
    mnn.fold_module(model)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(run(model, x), expected)


def test_a_state_dict_restores_the_layers(model_and_input):
    model, make, x, _ = model_and_input
    mnn.asymmetrise(model, "w", generator=seeded())
    torch.manual_seed(5)
    other = mnn.restore(make(), model.state_dict()).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(other, x), run(model, x))


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_networks_of_any_seed_share_the_fixed_parts(kind):
    def fixed(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = MODELS["convnext"][0]()
        mnn.asymmetrise(model, kind, generator=seeded(3))
        return {k: v for k, v in model.state_dict().items() if k.endswith(("_fixed", "_mask"))}

    first, second = fixed(0), fixed(1)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_outputs_keep_their_scale(name):
    # a pre-norm transformer has no normalisation that would hide a change of scale
    make, x, head = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    wild = copy.deepcopy(model)
    mnn.asymmetrise(model, "w", sigma=1.0, generator=seeded())
    mnn.asymmetrise(wild, "w", sigma=1.0, generator=seeded(), preserve_scale=False)
    norms: dict[str, list[float]] = {"kept": [], "wild": []}
    for label, chosen in (("kept", model), ("wild", wild)):
        for path, module in chosen.named_modules():
            weighs = isinstance(module, mnn.Asymmetric) and "weight" in module.fixed_names
            if weighs and not isinstance(module, nn.Embedding) and path != head:
                module.register_forward_hook(
                    lambda m, i, o, label=label: norms[label].append(float(o.std() / i[0].std()))
                )
        with torch.no_grad():
            run(chosen, x)
    assert min(norms["kept"]) > 0.3 and max(norms["kept"]) < 3
    assert max(norms["wild"]) > 3


@pytest.mark.parametrize("name", configs())
def test_every_transformers_family_folds_back(name):
    config = configs()[name]
    adapter = get_adapter("transformers")
    arch = adapter.resolve(config["model_type"], None, config)
    torch.manual_seed(0)
    model = adapter.build(arch)
    mnn.asymmetrise(model, "w", generator=seeded())
    batch = adapter.example_inputs(arch, model, seeded())
    plain = adapter.build(arch)
    plain.load_state_dict(mnn.fold(model))
    with torch.no_grad():
        torch.testing.assert_close(adapter.forward(plain, batch), adapter.forward(model, batch))


# -- selection ----------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_glob_or_predicate():
    def names(layers) -> list[str]:
        return mnn.asymmetrise(MODELS["vit"][0](), "w", generator=seeded(), layers=layers).converted

    assert names("blocks.*.mlp.fc1") == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert names(["head", "patch_embed.proj"]) == ["patch_embed.proj", "head"]
    assert names(lambda name, module: module.weight.shape[0] == 5) == ["head"]
    assert names("cls_token") == ["cls_token"]
    with pytest.raises(
        MergeidError, match="matches no linear or convolutional layer, embedding or table; the first ar"
    ):
        names("nothing")


def test_layers_too_narrow_for_distinct_masks_are_fixed_in_every_entry():
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 2, groups=64), nn.Linear(64, 3))

    model = make()
    done = mnn.asymmetrise(model, "w", generator=seeded())
    assert done.converted == ["0", "1"]
    assert bool((model[0].weight_fixed == 0).any()) and bool((model[1].weight_fixed != 0).all())
    assert len(model[1].weight_mask.unique()) == 1
    # who names a layer is told what it cannot have
    with pytest.raises(
        MergeidError, match=r"layer '1'.*64 neurons need distinct masks, but 4 weights with 1 fixed give"
    ):
        mnn.asymmetrise(make(), "w", layers="1", generator=seeded())


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama"])
def test_tables_get_fixed_parts_and_gains_do_not(name):
    make, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()
    done = mnn.asymmetrise(model, "w", generator=seeded())
    expected = {
        "vit": {"cls_token", "pos_embed", "patch_embed.proj"},
        "bert": {f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")},
        "gpt2": {"transformer.wte", "transformer.wpe", "lm_head"},
        "llama": {"model.embed_tokens"},
    }[name]
    assert expected <= set(done.converted)
    state = model.state_dict()
    fixed = [k for k in state if k.endswith("_fixed")]
    assert not any("norm" in k.lower() or "gamma" in k for k in fixed)
    for key in fixed:
        assert (state[key] != 0).any()
    assert type(make()).__name__ == type(model).__name__ and type(make()).__module__ == type(model).__module__


def test_gains_padding_and_what_is_not_trained_are_left_alone():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8, padding_idx=3)
            self.waves = nn.Embedding(5, 8)
            self.waves.weight.requires_grad = False
            self.scale = nn.Parameter(torch.ones(1, 1, 8))
            self.place = nn.Parameter(torch.randn(1, 5, 8, generator=seeded(1)))
            self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    torch.manual_seed(0)
    model = Network()
    done = mnn.asymmetrise(model, "w", generator=seeded())
    assert sorted(done.converted) == ["embed", "inner", "place"]
    assert done.skipped["waves"] == "it is not trained" and "gain or an offset" in done.skipped["scale"]
    assert bool((model.embed.weight[3] == 0).all()) and not bool((model.embed.weight[4] == 0).any())


def test_weights_that_start_too_large_are_brought_down_beside_the_fixed_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight.mul_(50)
    mnn.asymmetrise(model, "w", generator=seeded())
    trained = model[0]._parameters["weight"].detach()
    assert float(trained.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    assert float(model[0].weight.detach().square().sum(1).mean()) == pytest.approx(1, rel=0.3)


def test_without_a_layer_to_convert_the_model_is_refused():
    with pytest.raises(MergeidError, match=r"no layer of Linear was made asymmetric \(: task head\)"):
        mnn.asymmetrise(nn.Linear(3, 2), "w", generator=seeded())


# -- tied weights -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.second.weight = self.first.weight
        self.out.weight = self.embed.weight
        self.top = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.out(self.second(torch.relu(self.first(self.embed(x))))))


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_tied_weights_stay_tied(kind):
    torch.manual_seed(0)
    model = Tied().double()
    done = mnn.asymmetrise(model, kind, generator=seeded())
    assert done.converted == ["embed", "first", "second", "out"]
    assert torch.equal(model.out.weight, model.embed.weight) and torch.equal(model.out(torch.eye(8).double()).T[:, 0],
        model.embed.weight[:, 0])  # fmt: skip
    assert model.first._parameters["weight"] is model.second._parameters["weight"]
    assert torch.equal(model.first.weight, model.second.weight)
    x = torch.arange(6)
    expected = model(x)
    folded = mnn.fold(model)
    assert folded["first.weight"].data_ptr() == folded["second.weight"].data_ptr()
    torch.testing.assert_close(mnn.fold_module(copy.deepcopy(model))(x), expected)
    steps = torch.optim.SGD(model.parameters(), lr=0.1)
    expected.square().sum().backward()
    steps.step()
    assert torch.equal(model.first.weight, model.second.weight)
    assert torch.equal(model.out.weight, model.embed.weight)
    # a checkpoint of tied weights may hold them once
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("out.", "second.weight"))}
    other = mnn.restore(Tied().double(), state)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_half_of_a_tied_pair_is_refused_by_name():
    with pytest.raises(MergeidError, match=r"layer 'first' cannot be converted: its weight is tied to second\.weight"):
        mnn.asymmetrise(Tied(), "w", layers="first", generator=seeded())
    with pytest.raises(MergeidError, match=r"layer 'out' cannot be converted: its weight is tied to embed\.weight"):
        mnn.asymmetrise(Tied(), "w", layers="out", generator=seeded())


def test_a_layer_that_is_used_many_times_is_one_layer():
    torch.manual_seed(0)
    config = AlbertConfig(**SMALL, embedding_size=16, num_hidden_groups=1)
    model = AlbertModel(config).eval()
    mnn.asymmetrise(model, "w", generator=seeded())
    found = model(TOKENS).last_hidden_state
    plain = AlbertModel(config).eval()
    plain.load_state_dict(mnn.fold(model))
    torch.testing.assert_close(plain(TOKENS).last_hidden_state, found)


# -- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet", "ReLU"),
        ("convnext", "GELU"),
        ("vit", "GELU"),
        ("gpt2", "NewGELUActivation"),
        ("llama", "SiLUActivation"),
    ],
)
def test_activations_are_found_by_what_they_do(name, kind):
    make, x, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    before = run(model, x)
    done = mnn.asymmetrise(model, "sigma", generator=seeded(), example_inputs=x)
    assert done.converted and not any(m.training for m in model.modules())
    gated = [n for n, m in model.named_modules() if isinstance(m, mnn.SigmaAsymmetric)]
    assert gated == done.converted
    assert {type(m).ordinary.__name__ for m in model.modules() if isinstance(m, mnn.SigmaAsymmetric)} == {kind}
    found = run(model, x)
    assert torch.isfinite(found).all() and not torch.allclose(found, before)
    again = mnn.restore(make().eval(), model.state_dict())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(again, x), found)
    torch.testing.assert_close(run(copy.deepcopy(model), x), found)
    with pytest.raises(MergeidError, match=r"gate_fixed': a σ-asymmetric activation has no ordinary form"):
        mnn.fold(model)


def test_gates_lie_on_the_axis_of_the_neurons():
    first = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.Dropout()]
    model = nn.Sequential(*first, nn.Tanh(), nn.Linear(5, 2), nn.Softmax(-1))
    done = mnn.asymmetrise(model, "sigma", generator=seeded(), example_inputs=torch.randn(2, 3, 4, 4))
    assert done.converted == ["1", "5"]
    assert model[1].gate_fixed.shape == (6, 6, 1, 1) and model[5].gate_fixed.shape == (5, 5)
    assert model.training and model[4].training


def test_an_activation_on_several_widths_is_left_out_by_name():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 5), act, nn.Linear(5, 5), nn.GELU())
    done = mnn.asymmetrise(model, "sigma", generator=seeded(), example_inputs=torch.randn(2, 3))
    assert done.converted == ["5"]
    assert done.skipped == {"1": "it is used on several spaces of neurons (widths 4, 5)"}


def test_sigma_needs_example_inputs():
    with pytest.raises(MergeidError, match='kind "sigma" needs example_inputs'):
        mnn.asymmetrise(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "sigma", generator=seeded())
