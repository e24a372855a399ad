"""The network that a folder's modules make together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.plugins import Architecture, Batch, MergeidError, get_adapter, returned_tensors
from mergeid_sentence_transformers.folder import LIBRARY, POOLED, Step

FEATURES = ("logits", "last_hidden_state")
"""What an encoder returns for every token."""


class Chain(nn.Module):
    """Modules that hand on a dictionary of features. Keys of its state dict begin with a module's number.

    Args:
        modules: in the order in which they run.
        encoder: number of the one that transformers runs; None: there is none.
    """

    def __init__(self, modules: Sequence[nn.Module], encoder: int | None) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)
        self.encoder = encoder

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features after the last module, and the pooled output of an encoder that has one."""
        found: dict[str, Any] = dict(features)
        for i, module in enumerate(self.children()):
            if i == self.encoder:
                returned = _encoded(module, features)
                found["token_embeddings"] = next(returned[k] for k in (*FEATURES, *returned) if k in returned)
                found |= {k: v for k, v in returned.items() if k == POOLED}
            else:
                found = module(found)
        return found


def _encoded(encoder: nn.Module, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' network returns, as it is: joined to one task output, all would count as read."""
    accepted = inspect.signature(encoder.forward).parameters
    more = {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if k in accepted or "kwargs" in accepted}
    return returned_tensors(encoder(**{k: v for k, v in features.items() if k in accepted}, **more))


def built(steps: Sequence[Step], config: Mapping[str, Any], inner: Mapping[int, Architecture], device: Any) -> Chain:
    """The modules with random weights.

    Args:
        inner: number of a module -> the architecture of transformers that it is.

    Raises `MergeidError` for a module that sentence-transformers does not have, or that needs more than its config."""
    modules = []
    for i, step in enumerate(steps):
        if i in inner:
            modules.append(get_adapter("transformers").build(inner[i], device=device))
            continue
        try:
            with torch.device(device):
                modules.append(_module(step, config))
        except MergeidError:
            raise
        except Exception as error:  # each class has its own ways to refuse what a config says
            raise MergeidError(
                f"module {step.folder or '0'} ({step.kind}) cannot be built from its config ({error}); check the "
                "folder, and that it belongs to the installed version of sentence-transformers"
            ) from error
    return Chain(modules, next(iter(inner), None)).eval()


def _module(step: Step, config: Mapping[str, Any]) -> nn.Module:
    if not step.kind.startswith(LIBRARY):
        raise MergeidError(
            f"module {step.folder or '0'} is of the class {step.kind!r}, whose code comes with the checkpoint and "
            "is not run; expected a class of sentence-transformers, or give --match never"
        )
    from sentence_transformers.util import import_from_string

    kind: Any = import_from_string(step.kind)
    files = {**config["settings"].get(step.folder, {}), "config.json": config["parts"].get(step.folder, {})}
    stated = dict(files.get(getattr(kind, "config_file_name", "config.json"), {}))
    if "activation_function" in stated:
        stated["activation_function"] = _activation(str(stated["activation_function"]))
    if any(key.startswith("pooling_mode_") for key in stated):
        from sentence_transformers.sentence_transformer.modules.pooling import _convert_legacy_pooling_kwargs

        _convert_legacy_pooling_kwargs(stated)
    for old, new in getattr(kind, "config_key_renames", {}).items():
        if old in stated:
            stated[new] = stated.pop(old)
    accepted = inspect.signature(inspect.unwrap(kind.__init__)).parameters
    module: nn.Module = kind(**{k: v for k, v in stated.items() if k in accepted})
    return module


def _activation(name: str) -> nn.Module:
    """One of torch's own activations. Raises `MergeidError` for any other class."""
    from sentence_transformers.util import import_from_string

    kind = import_from_string(name) if name.startswith("torch.nn.") else None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise MergeidError(f"activation {name!r} is not one of torch's; expected a class such as torch.nn.Tanh")
    return kind()


def embedding(found: Mapping[str, Any]) -> tuple[str, Tensor]:
    """What the modules are run for: the sentence's embedding, or the tokens' where there is none."""
    name = "sentence_embedding" if "sentence_embedding" in found else "token_embeddings"
    return name, found[name]


def inputs(batch: Batch) -> dict[str, Any]:
    """Without targets."""
    return {k: v for k, v in batch.items() if k != "labels"}
