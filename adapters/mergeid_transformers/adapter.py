"""The adapter: transformers' models seen through mergeid's protocol. transformers itself is imported on first use,
since its import takes seconds."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid import plugins
from mergeid.plugins import (
    Architecture,
    Batch,
    ConfigDifference,
    LossParts,
    MergeidError,
    Mixture,
    MixtureRequest,
    TensorTable,
)
from mergeid_transformers import compare, configs, files, labels, mixture, modules
from mergeid_transformers.names import computed, stacked, tensor_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

POOLER = "pooler"


class TransformersAdapter:
    """Any transformers folder with a ``config.json``. Code that comes with a checkpoint is never run.

    `Architecture.options` holds ``config`` (the content of config.json, or None for the model type's defaults),
    ``model_class`` (name of the class to build) and ``pooler`` (False where the checkpoint has no pooling head, so
    that none with random weights is built).
    """

    name = "transformers"

    def architectures(self) -> Iterable[str]:
        """All model types of the installed transformers."""
        from mergeid_transformers.configs import model_types

        return model_types()

    def at_hand(self, name: str, config: Mapping[str, Any] | None) -> bool:
        """Whether the installed transformers has a file for that model type, and the config says no other."""
        from mergeid_transformers.installed import has_type

        return (config or {}).get("model_type") in (None, name) and has_type(name)

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """The architecture that a config.json states; tensor names alone are not enough (None)."""
        if config is None or not isinstance(config.get("model_type"), str):
            return None
        return self._architecture(config["model_type"], table, config)

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """The model type (``bert``) or class (``BertForMaskedLM``) that the user named.

        Raises `MergeidError` for an unknown name, for a config.json of another model type, and for a checkpoint
        without config.json (its sizes are not written in tensor names).
        """
        from mergeid_transformers.configs import library_config, model_class, model_types

        model_type, chosen = name, None
        if name not in model_types():
            found = self._type_of_class(name)
            if found is None:
                library_config(name, config)  # raises with near names
                raise MergeidError(
                    f"transformers has no model type {name!r}; mergeid adapters 'transformers/*' lists them"
                )
            model_type, chosen = found, name
        if config is None and table is not None:
            raise MergeidError(
                f"--arch transformers/{name} needs the model's config.json (sizes and heads are not written in the "
                "tensors); put it beside the checkpoint or give its path: --arch path/to/config.json"
            )
        if config is not None and config.get("model_type") not in (None, model_type):
            raise MergeidError(
                f"--arch transformers/{name} does not fit the config.json, whose model_type is "
                f"{config['model_type']!r}; leave --arch out or name that one"
            )
        arch = self._architecture(model_type, table or {}, config)
        if chosen is not None:
            model_class(model_type, chosen)
            arch = Architecture(self.name, model_type, {**arch.options, "model_class": chosen})
        return arch

    @staticmethod
    def _type_of_class(name: str) -> str | None:
        """Model type of one of the library's own class names (``"GPT2LMHeadModel"`` -> ``"gpt2"``)."""
        from mergeid_transformers.configs import has_class, model_class, model_types

        if not has_class(name) or not name[:1].isupper():
            return None
        config_class = getattr(model_class(name, name), "config_class", None)
        model_type = getattr(config_class, "model_type", None)
        return model_type if model_type in model_types() else None

    def _architecture(self, model_type: str, table: TensorTable, config: Mapping[str, Any] | None) -> Architecture:
        names = frozenset(table)
        stated = (config or {}).get("architectures")
        if isinstance(stated, list) and stated and isinstance(stated[0], str) and not (config or {}).get("auto_map"):
            chosen = stated[0]  # checked when it is built, so that recognising stays fast
        else:
            from mergeid_transformers.configs import choose_class

            chosen = choose_class(model_type, config, names)
        options: dict[str, Any] = {"config": None if config is None else dict(config), "model_class": chosen}
        options["pooler"] = not names or any(f".{POOLER}." in f".{n}" for n in names)
        return Architecture(self.name, model_type, options)

    def shrink(self, arch: Architecture) -> Architecture:
        """The same code with a few narrow layers: what verifies the graph of a model too large to run."""
        from mergeid_transformers.configs import library_config
        from mergeid_transformers.shrink import shrunken

        small = shrunken(library_config(arch.name, arch.options.get("config")))
        return replace(arch, options={**arch.options, "config": {**small.to_dict(), "model_type": arch.name}})

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """A float32 model with random weights in eval mode, without caches.

        Raises `MergeidError` where transformers has no such class, and where the class refuses the config.
        """
        import torch

        from mergeid_transformers.configs import choose_class, library_config, model_class, text_config

        given = arch.options.get("config")
        name = str(arch.options.get("model_class") or choose_class(arch.name, given, frozenset()))
        config = library_config(arch.name, given)
        if name.endswith("ForSequenceClassification") and getattr(config, "pad_token_id", None) is None:
            # Decoders classify at the last token that is no padding, so they insist on a padding id.
            text_config(config).pad_token_id = 0
        kind = model_class(arch.name, name)
        try:
            model = plugins.made_on(device, lambda: _described(kind(config), config))
        except (MergeidError, MemoryError):
            raise
        except Exception as error:  # hundreds of classes, and none expects a config that does not fit together
            raise MergeidError(
                f"transformers cannot build {name} from the config.json "
                f"({type(error).__name__}: {plugins.reason(error)}); check that config and transformers version belong "
                "together"
            ) from error
        pooler = getattr(model, POOLER, None)
        if not arch.options.get("pooler", True) and isinstance(pooler, torch.nn.Module) and list(pooler.parameters()):
            model.pooler = None
        model = model.eval().to(dtype=torch.float32)
        if str(device) == "meta" or not any(p.is_meta for p in model.parameters()):
            model = model.to(device)  # a few classes ignore the default device
        answer: nn.Module = model
        return answer

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Checkpoint tensor name -> model tensor name; see `mergeid_transformers.names` for what is left out."""
        return tensor_names(model, table)

    def stacked(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Sequence[Sequence[str]]]:
        """See `mergeid.plugins.StacksExperts`."""
        return stacked(model, names)

    def computed(self, model: nn.Module, missing: Sequence[str]) -> Sequence[str]:
        """See `mergeid.plugins.ComputesTables`."""
        return computed(model, missing)

    def conversions(self, model: nn.Module, table: TensorTable) -> Sequence[plugins.Conversion]:
        """See `mergeid.plugins.ConvertsWeights`."""
        from mergeid_transformers.conversions import conversions

        return conversions(model, table)

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """Short random sequences and images of the model's own size, made from its forward signature."""
        from mergeid_transformers.inputs import example_inputs

        return example_inputs(model, self._task(arch), generator, batch_size)

    def _task(self, arch: Architecture) -> str:
        from mergeid_transformers.tasks import task_of

        return task_of(str(arch.options["model_class"]), arch.options.get("config") or {})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits where there is a head (start and end logits stacked), else hidden states; no cache.

        Raises `MergeidError` where the batch has inputs that the model does not take or lacks all it needs.
        """
        from mergeid_transformers.tasks import task_output

        return task_output(self._run(model, batch))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The task output and all else that the model returns but by-products; errors as in `forward`."""
        from mergeid_transformers.outputs import interface
        from mergeid_transformers.tasks import task_output

        output = self._run(model, batch)
        found = plugins.returned_tensors(output)
        return plugins.task_first(task_output(output), {k: found[k] for k in interface(list(found))})

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of transformers' models, which has been imported then."""
        import sys

        library = sys.modules.get("transformers")
        return library is not None and isinstance(model, library.PreTrainedModel)

    def logits(self, model: nn.Module) -> str | None:
        """``"logits"`` of tasks that are judged by cross-entropy."""
        from mergeid_transformers.tasks import EXAMPLE_TASKS, TOKEN_TASKS, class_count, task_of

        config: Any = model.config
        task = task_of(type(model).__name__, config.to_dict())
        if task in EXAMPLE_TASKS:
            kind = getattr(config, "problem_type", None)
            return "logits" if kind in (None, "single_label_classification") and class_count(config) > 1 else None
        return "logits" if task in TOKEN_TASKS else None

    def interface(self, names: Sequence[str]) -> list[str]:
        """Without caches, attentions, hidden states beside a task's own outputs, and outputs of sub-models."""
        from mergeid_transformers.outputs import interface

        return interface(names)

    @staticmethod
    def _run(model: nn.Module, batch: Batch) -> Any:
        from mergeid_transformers.inputs import parameters_of

        accepted = parameters_of(model)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        unknown = [k for k in inputs if k not in accepted and "kwargs" not in accepted]
        if unknown or not inputs:
            raise MergeidError(
                f"{type(model).__name__} takes no input {unknown[0]!r}; leave it out of the data, or rename it"
                if unknown
                else "the data has no inputs beside labels; add the model's inputs"
            )
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        if "return_dict" in accepted or "kwargs" in accepted:
            inputs["return_dict"] = True
        return model(**inputs)

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """Cross-entropy as transformers computes it, summed per example; None without labels or a task head."""
        from mergeid_transformers.tasks import EXAMPLE_TASKS, TOKEN_TASKS, loss_parts

        task = self._task(arch)
        targets = batch.get("labels")
        if targets is None or task not in TOKEN_TASKS | EXAMPLE_TASKS:
            return None
        config = arch.options.get("config") or {}
        if task in EXAMPLE_TASKS and (
            config.get("problem_type") not in (None, "single_label_classification") or output.shape[-1] == 1
        ):
            return None
        return loss_parts(task, output, targets)

    def preprocessing(self, arch: Architecture, folder: Path | None = None) -> Mapping[str, Any]:
        """How raw data becomes a batch: from the folder's preprocessor and tokenizer files where it has them,
        else from the config."""
        from mergeid_transformers.preprocessing import preprocessing

        return preprocessing(arch, self._task(arch), folder)

    def check(self, arch: Architecture, batch: Batch) -> None:
        """Raises `MergeidError` where a batch does not fit the model (token ids, channels, label range)."""
        from mergeid_transformers.preprocessing import check

        check(arch, self._task(arch), batch)

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """``"layer 3 MLP hidden"``, ``"layer 3 attention queries and keys"``, ``"residual stream"``, …"""
        return labels.space_label(axes)

    def companion_files(self, folder: Path) -> list[Path]:
        """Config, tokenizer, processor and pipeline files beside the weights."""
        return files.companion_files(folder)

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """The config itself: tensors and metadata say too little."""
        return config if config is not None and isinstance(config.get("model_type"), str) else None

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """Fields that change what the network computes; see `mergeid_transformers.compare`."""
        return compare.differences(a, b)

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """`other`'s function with `config`'s own labels, sizes and storage; `other`'s class with `head`."""
        return compare.adopted(config, other, head=head)

    def ties(self, config: Mapping[str, Any]) -> bool | None:
        """Whether the config says that the output head is the embedding."""
        return compare.ties(config)

    def with_ties(self, config: Mapping[str, Any], tied: bool) -> dict[str, Any] | None:
        """The config with ``tie_word_embeddings`` set; None where more than that would change."""
        return compare.with_ties(config, tied)

    def with_classes(self, arch: Architecture, classes: int) -> Architecture:
        """The architecture with a head for so many classes."""
        config = configs.config_with_classes(arch.options.get("config") or {}, classes, None)
        return replace(arch, options={**arch.options, "config": config})

    def config_with_classes(
        self, config: Mapping[str, Any], classes: int, labels: Sequence[str] | None
    ) -> dict[str, Any]:
        """A config.json that says so."""
        return configs.config_with_classes(config, classes, labels)

    def config_for(self, config: Mapping[str, Any], task: str) -> dict[str, Any] | None:
        """The class for a task of PEFT."""
        return configs.config_for(config, task)

    def mixture(self, config: Mapping[str, Any], names: Sequence[str], asked: MixtureRequest) -> Mixture | None:
        """What decoders make; see `mergeid_transformers.mixture`."""
        return mixture.mixture(config, names, asked)

    def modules(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str] | None:
        """Encoder, decoder, vision tower, …"""
        return modules.modules(config, names)

    def layer_inputs(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """What enters each layer."""
        return mixture.layer_inputs(model, batch)

    def differences(self, a_folder: Path, b_folder: Path) -> list[str]:
        """Label maps and tokenizers in which two checkpoints disagree, one sentence each."""
        return files.differences(a_folder, b_folder)


def _described(model: Any, config: Any) -> Any:
    """What every model of the library says of itself; parts that are plain modules do not."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        model.config, model.base_model_prefix = config, ""
        model.main_input_name = next(n for n in inspect.signature(type(model).forward).parameters if n != "self")
    return model
