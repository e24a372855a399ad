"""Live modules that meet: equal tensors in layers of other kinds or settings are another function."""

from __future__ import annotations

import copy
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mergeid.basics.casting import in_precision, kept_kind
from mergeid.basics.hooks import listening
from mergeid.basics.nested import mapped
from mergeid.basics.state import load_weights, uncompiled
from mergeid.models.loaded import Loaded
from mergeid.models.mapped import LARGEST_HELD
from mergeid.models.running import eval_mode
from mergeid.plugins import Batch, ConfigDifference

HARMLESS = frozenset({"training", "inplace", "momentum", "dropout", "p", "track_running_stats", "padding_idx"})
"""Attributes of torch's own layers that do not count where a trained network is run."""
SHAPES = frozenset({
    "in_features", "out_features", "in1_features", "in2_features", "num_features", "in_channels", "out_channels",
    "num_embeddings", "embedding_dim", "normalized_shape", "num_channels", "num_parameters", "input_size",
    "hidden_size", "embed_dim", "kdim", "vdim", "head_dim",
})  # fmt: skip
"""What the shapes of the tensors say too."""
ROUNDING, COARSE = 1e-3, 0.05
"""Share by which outputs of one function may differ, in float32 or wider and in shorter formats."""


def module_differences(a: nn.Module, b: nn.Module) -> list[ConfigDifference]:
    """Layers of torch itself that lie in one place of both modules and compute different things: other kinds
    (``act: ReLU and GELU``), or other settings (``norm.eps``). What foreign code does besides is not seen."""
    found: list[ConfigDifference] = []
    theirs = dict(b.named_modules())
    for name, one in a.named_modules():
        two = theirs.get(name)
        if two is None or not (_known(one) and _known(two)):
            continue
        if type(one) is not type(two):
            found.append(ConfigDifference(name or "kind", type(one).__name__, type(two).__name__))
            continue
        mine, its = _settings(one), _settings(two)
        found += [
            ConfigDifference(f"{name}.{key}".removeprefix("."), mine.get(key), its.get(key))
            for key in mine.keys() | its.keys()
            if mine.get(key) != its.get(key)
        ]
    return sorted(found)


def _known(module: nn.Module) -> bool:
    """A layer of torch's own that does something when a trained network is run."""
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not isinstance(module, (_DropoutNd, nn.Identity))


def code_difference(one: Loaded, two: Loaded) -> list[ConfigDifference] | None:
    """What may be the reason why the first one's code, with the second one's weights, computes something else on the
    example than the second one: attributes of modules of any code that differ (numbers, switches, words, functions).
    None where it computes the same, and where that cannot be tried; large models are not copied for it."""
    held = [p for m in (one.model, two.model) for p in m.parameters()]
    if one.model is two.model or any(p.is_meta for p in held) or sum(p.numel() for p in held) > 2 * LARGEST_HELD:
        return None
    shapes = [{k: t.shape for k, t in m.state().items()} for m in (one, two)]
    if shapes[0] != shapes[1]:
        return None
    try:
        changed = copy.deepcopy(one.model)
        load_weights(changed, two.state())
        taken, wanted = changed.state_dict(), two.state()
        apart = next((k for k in wanted if not torch.equal(taken[k], wanted[k].to(taken[k]))), None)
        if apart is not None:
            return [ConfigDifference(f"whether {apart} is a tensor of its own", False, True)]
        with uncompiled():
            if _alike((one, changed), (two, two.model)) or not _is_of_code(one, two):
                return None
    except Exception:  # foreign code that takes no copy, or other inputs: elsewhere that is told
        return None
    theirs = dict(two.model.named_modules())
    pairs = [(name, m, theirs[name]) for name, m in one.model.named_modules() if name in theirs]
    return sorted(
        ConfigDifference(f"{name}.{key}".removeprefix("."), _word(vars(a)[key]), _word(vars(b)[key]))
        for name, a, b in pairs
        for key in vars(a).keys() & vars(b).keys() - HARMLESS
        if key[0] != "_" and _word(vars(a)[key]) is not None and _word(vars(a)[key]) != _word(vars(b)[key])
    )


def _alike(*runs: tuple[Loaded, nn.Module]) -> bool:
    """Whether two modules compute the same on the first one's example, but for rounding in the formats of both."""
    outputs, example = [], runs[0][0].inputs
    fine = all(t.dtype.itemsize >= 4 for _, net in runs for t in net.state_dict().values() if t.is_floating_point())
    for model, net in runs:
        inputs = mapped(example, lambda t: t.clone())  # a model may write into them
        with torch.no_grad(), eval_mode(net):
            outputs.append(model.forward(net, inputs))
    return _apart(*outputs) <= (ROUNDING if fine else COARSE)


def _is_of_code(one: Loaded, two: Loaded) -> bool:
    """Whether outputs differ for no other reason: noise that does not follow torch's seed, what the passes before left
    in a model (recurrent states, caches), or formats in which small numbers cancel."""
    formats = {t.dtype for m in (one, two) for t in m.state().values() if t.is_floating_point()}
    wide = torch.float32 if len(formats) > 1 else None
    wanted, changed = (in_precision(copy.deepcopy(m.model), wide) for m in (two, one))
    if wide is not None:
        one = replace(one, example=mapped(one.example, lambda t: t.to(kept_kind(t, wide))))
    load_weights(changed, wanted.state_dict())
    if not _alike((one, wanted), (two, wanted)):
        return False
    modules = dict(changed.named_modules())
    for name, key, value in _states(two, wanted, one.inputs):
        holder = modules[name].__dict__
        (holder["_buffers"] if key in holder["_buffers"] else holder)[key] = copy.deepcopy(value)
    return not _alike((one, changed), (two, wanted))


def _states(model: Loaded, net: nn.Module, inputs: Batch) -> list[tuple[str, str, Any]]:
    """(module, attribute, value before) of what a pass writes to."""
    if isinstance(net, torch.jit.ScriptModule):
        return []

    def held() -> dict[tuple[str, str], Any]:
        every = [(n, k, v) for n, m in net.named_modules() for k, v in (*vars(m).items(), *m._buffers.items())]
        return {(n, k): v.detach().clone() if isinstance(v, Tensor) else copy.copy(v) for n, k, v in every if _keeps(v)}

    before, after = held(), dict[tuple[str, str], Any]()
    handle = net.register_forward_hook(lambda *_: after.update(held()))
    with listening([handle]), eval_mode(net):
        model.forward(net, mapped(inputs, lambda t: t.clone()))
    return [(*at, value) for at, value in before.items() if at in after and not _same(value, after[at])]


def _keeps(value: Any) -> bool:
    return value is None or type(value) in (int, float, list, dict) or isinstance(value, Tensor)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        a, b = [*a, *a.values()], [*b, *b.values()]
    return a == b if not isinstance(a, list) else len(a) == len(b) and all(map(operator.is_, a, b))


def _apart(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b|, of what is finite in both."""
    if a.shape != b.shape:
        return float("inf")
    x, y = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64).cpu() for t in (a, b))
    known = x.isfinite() & y.isfinite()
    size = float(y[known].norm())
    return float((x - y)[known].norm()) / size if size else 0.0


def _word(value: Any) -> Any:
    """What a message can say of an attribute; None for what is no setting."""
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__name__", None)
    return value if _is_plain(value) else None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, switches and words (and tuples of such) that a layer holds."""
    known = HARMLESS | SHAPES
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in known and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (bool, int, float, str))
