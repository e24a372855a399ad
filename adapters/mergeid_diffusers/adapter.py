"""The adapter: diffusers' pipelines and networks seen through mergeid's protocol. diffusers itself is imported on first
use, since its import takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid import plugins
from mergeid.plugins import Architecture, Batch, ConfigDifference, Contents, LossParts, MergeidError, TensorTable
from mergeid_diffusers import pipeline, single_file
from mergeid_diffusers.installed import has_network, is_network

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLASS = "_class_name"
INPUTS = frozenset({"sample_size", "sample_height", "sample_width", "sample_frames"})
"""Fields that say how large inputs are as a rule."""
HARMLESS = frozenset({"dropout", "force_upcast", "upcast_attention", "use_safetensors"})
"""How the same function is computed or trained."""


class DiffusersAdapter:
    """Pipelines (a folder with a ``model_index.json``), networks (a folder with a config that names a class of
    diffusers), and single files in other tools' names beside such a config.

    `Architecture.options` holds ``config``, for a pipeline ``inner`` (name of a network -> its architecture), and for a
    single file ``table``, its tensors.
    """

    name = "diffusers"

    def contents(self, names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
        """The networks of a pipeline; see `mergeid_diffusers.pipeline`."""
        return pipeline.contents(names, read)

    def architectures(self) -> Iterable[str]:
        """All networks of the installed diffusers; none where it is not installed."""
        try:
            import diffusers
        except ImportError:
            return []
        from diffusers.models.modeling_utils import ModelMixin

        return sorted(n for n in dir(diffusers) if is_network(n) and _is_class(getattr(diffusers, n), ModelMixin))

    def at_hand(self, name: str, config: Mapping[str, Any] | None) -> bool:
        """Whether the installed diffusers has a file with that network, and the config says no other."""
        return (config or {}).get(CLASS) in (None, name) and has_network(name)

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """From the class that the config names; Flux transformers of the released width also from their tensors."""
        config = config or single_file.flux_config(table)
        if config is None or not isinstance(config.get(CLASS), str):
            return None
        options: dict[str, Any] = {"config": dict(config)}
        if "parts" in config:
            options["inner"] = self._inner(table, config)
        elif single_file.is_foreign(table):
            options["table"] = dict(table)
        return Architecture(self.name, str(config[CLASS]), options)

    def _inner(self, table: TensorTable, config: Mapping[str, Any]) -> dict[str, Architecture]:
        """The networks whose class is diffusers' or transformers'; others are merged, but not built."""
        found = {}
        for name, own in config["parts"].items():
            tensors = {n.removeprefix(f"{name}."): i for n, i in table.items() if n.startswith(f"{name}.")}
            library, kind = config["components"][name]
            if library == "transformers":
                arch = plugins.get_adapter("transformers").recognise(tensors, {**own, "architectures": [kind]}, {})
            else:
                arch = self.recognise(tensors, own, {}) if library == "diffusers" else None
            if arch is not None:
                found[name] = arch
        return found

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """A class of diffusers by its name. Raises `MergeidError` for an unknown one, or another than the config's."""
        stated = (config or {}).get(CLASS)
        if stated not in (None, name):
            raise MergeidError(
                f"--arch {self.name}/{name} does not fit the config.json, which says {stated}; leave it out"
            )
        if name not in self.architectures() and stated is None:
            near = plugins.near_names(name, self.architectures())
            raise MergeidError(
                f"diffusers has no network {name!r}; "
                + (f"near names are {', '.join(near)}" if near else "mergeid adapters 'diffusers/*' lists them")
            )
        if config is None and table is not None and single_file.flux_config(table) is None:
            raise MergeidError(
                f"--arch {self.name}/{name} needs the network's config.json, for its sizes are not in the tensors; "
                "put it beside the checkpoint or give its path: --arch path/to/config.json"
            )
        found = self.recognise(table or {}, {**(config or {}), CLASS: name} if config or table is None else None, {})
        assert found is not None
        return found

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """A float32 network, or all of a pipeline, with random weights in eval mode.

        Raises `MergeidError` where diffusers is not installed, has no such class, or refuses the config."""
        import torch

        if "inner" in arch.options:
            from mergeid_diffusers.running import Pipeline

            inner = arch.options["inner"]
            libraries = {
                n: self if a.adapter == self.name else plugins.get_adapter(a.adapter) for n, a in inner.items()
            }
            return Pipeline({n: libraries[n].build(a, device=device) for n, a in inner.items()}).eval()
        try:
            import diffusers
        except ImportError as error:
            raise MergeidError(
                "this needs the library diffusers, which is not installed: pip install 'mergeid[diffusers]'"
            ) from error
        kind = getattr(diffusers, arch.name, None)
        if kind is None or not hasattr(kind, "from_config"):
            raise MergeidError(f"diffusers {diffusers.__version__} has no network {arch.name!r}; check config.json")
        try:
            with torch.device(device):
                model: Any = kind.from_config(dict(arch.options["config"]))
        except Exception as error:  # a hundred classes, and none expects a config that does not fit together
            raise MergeidError(
                f"diffusers cannot build {arch.name} from the config "
                f"({type(error).__name__}: {plugins.reason(error)}); check that it belongs to the installed version"
            ) from error
        model = model.eval().to(device=device, dtype=torch.float32)
        if "table" in arch.options:
            from mergeid_diffusers.held import SingleFile

            convert = single_file.conversion(arch.name, arch.options["config"])
            model = SingleFile(model, arch.options["table"], convert).eval()
        built: nn.Module = model
        return built

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Identity, but for what transformers calls otherwise in a pipeline's text encoders."""
        inner, keys = arch.options.get("inner"), set(model.state_dict())
        if inner is None:
            return {n: n for n in table if n in keys}
        found: dict[str, str] = {}
        for name, own in inner.items():
            tensors = {n.removeprefix(f"{name}."): i for n, i in table.items() if n.startswith(f"{name}.")}
            library = self if own.adapter == self.name else plugins.get_adapter(own.adapter)
            names = library.tensor_names(own, model.get_submodule(name), tensors)
            found |= {f"{name}.{n}": f"{name}.{k}" for n, k in names.items()}
        return found

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """Small random latents, texts and time steps; for a pipeline those of every network under its name.

        Raises `MergeidError` where no known layout fits."""
        from mergeid_diffusers.running import example_inputs

        if "inner" not in arch.options:
            return example_inputs(model, generator, batch_size)
        found: Batch = {}
        for name, own in arch.options["inner"].items():
            part = model.get_submodule(name)
            if own.adapter == self.name:
                found[name] = example_inputs(part, generator, batch_size)
            else:
                batch = plugins.get_adapter(own.adapter).example_inputs(own, part, generator, batch_size)
                found[name] = {k: v for k, v in batch.items() if k != "labels"}
        return found

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The first of its outputs."""
        return next(iter(self.outputs(model, batch).values()))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """All that a network returns, an autoencoder's latents too; ``"unet.sample"`` in a pipeline."""
        from mergeid_diffusers.running import Pipeline, run

        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if not isinstance(model, Pipeline):
            return run(model, inputs)
        return {f"{name}.{k}": t for name, found in model(**inputs).items() for k, t in found.items()}

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """None: there are no labels."""
        return None

    def preprocessing(self, arch: Architecture, folder: Path | None = None) -> Mapping[str, Any]:
        """Nothing is known: latents come from another network."""
        return {"kind": "other", "input": "sample"}

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """The innermost module that all its tensors share, of those that write it."""
        listed = sorted(name.rpartition(".")[0] for name, axis in axes if axis == 0 and name.endswith("weight"))
        return listed[0] if len(listed) == 1 else None

    def companion_files(self, folder: Path) -> list[Path]:
        """Configs of networks, schedulers and tokenizers."""
        return sorted(p for p in folder.glob("**/*") if p.suffix in (".json", ".txt", ".model") and p.is_file())

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """The config, where it names a class of diffusers."""
        if config is None or not isinstance(config.get(CLASS), str):
            return None
        own = "parts" in config or "_diffusers_version" in config or _defaults(str(config[CLASS]))
        return config if own else None

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """Classes, networks of a pipeline, and all fields but those that are known to be harmless. Fields that one
        config leaves out have the class's default."""
        if "parts" in a and "parts" in b:
            if a["components"] != b["components"]:
                return [ConfigDifference("components", a["components"], b["components"])]
            return plugins.part_differences(a["parts"], b["parts"])
        if a[CLASS] != b[CLASS]:
            return [ConfigDifference(CLASS, a[CLASS], b[CLASS])]
        one, two = (_compared(c) for c in (a, b))
        if one.keys() != two.keys():
            defaults = _defaults(str(a[CLASS]))
            one, two = ({**{k: v for k, v in defaults.items() if k in {*one, *two}}, **c} for c in (one, two))
        return [
            ConfigDifference(k, one.get(k), two.get(k), "inputs" if k in INPUTS else "function")
            for k in sorted({*one, *two})
            if one.get(k) != two.get(k)
        ]

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """`other`'s function, network by network."""
        if "parts" in config and "parts" in other:
            return {**deepcopy(dict(other)), "parts": plugins.part_adopted(config["parts"], other["parts"], head=head)}
        return deepcopy({**{k: v for k, v in config.items() if k.startswith("_")}, **other})


def _is_class(value: Any, parent: type) -> bool:
    return isinstance(value, type) and issubclass(value, parent)


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in HARMLESS}


def _defaults(kind: str) -> dict[str, Any]:
    """What the class takes where a config is silent, as JSON has it."""
    import inspect

    try:
        import diffusers
    except ImportError:
        return {}
    init = getattr(getattr(diffusers, kind, None), "__init__", None)
    if init is None:
        return {}
    found = {n: p.default for n, p in inspect.signature(init).parameters.items() if p.default is not p.empty}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in found.items() if n not in HARMLESS}
